#!/bin/sh
# migrate.sh - one migration, by nothing but lines of QEMU's human monitor.
#
#   migrate.sh SOURCE.qmp DESTINATION.qmp rdma:HOST:PORT
#
# The sockets are those that 'qemu-rdma-helper attach --qmp' serves. The one of the other host can be
# had with 'ssh -nNT -L ./destination.qmp:/run/guest.qmp destination'; it is '-' where the
# destination listens already. Two variables are heeded: PIN_ALL (on or off; on) and MAX_BANDWIDTH
# (as in the monitor; 40g).
#
# Exit status: 0 the guest is at the destination, 1 it is not, 2 wrong usage. Ctrl-C cancels, and the
# guest runs on at the source.
set -u

[ $# = 3 ] || { echo "usage: ${0##*/} SOURCE.qmp DESTINATION.qmp rdma:HOST:PORT" >&2; exit 2; }
source=$1 destination=$2 uri=$3

die() { echo "${0##*/}: $*" >&2; exit 1; }
run() { # run WHERE SOCKET LINE...: sets $said to what these lines answer; an error ends the script
    where=$1; shift
    # Ctrl-C is for this script alone, so that it always knows what was done.
    said=$(trap '' INT; qemu-rdma-helper hmp --qmp "$@" 2>&1) || die "$where: $said"
}
said() { printf '%s\n' "$said" | sed -n "$1"; }

run source "$source" "migrate_set_capability rdma-pin-all ${PIN_ALL:=on}" \
    "migrate_set_parameter max-bandwidth ${MAX_BANDWIDTH:=40g}"
if [ "$destination" != - ]; then
    run destination "$destination" "migrate_set_capability rdma-pin-all $PIN_ALL" \
        "migrate_incoming $uri"
fi

cancel=
trap 'cancel=1' INT TERM
run source "$source" "migrate -d $uri"
while :; do
    if [ -n "$cancel" ]; then
        trap '' INT TERM
        cancel=
        run source "$source" migrate_cancel
    fi
    run source "$source" 'info migrate'
    # From QEMU 10.1 on the figures are in groups.
    state=$(said 's/^Migration status: //p; s/^Status:[[:space:]]*//p')
    case $state in
    completed*) break ;;
    failed*) die "the migration $state" ;;
    cancelled*) die "cancelled; the guest runs on at the source" ;;
    esac
    rate=$(said 's/^throughput: /, /p; s/^  Throughput (Mbps):[[:space:]]*\(.*\)/, \1 mbps/p')
    left=$(said 's/^remaining ram: \(.*\)/, \1 left/p; s/^  Transfers:.* remain=\(.*\)/, \1 left/p')
    echo "$state$rate$left"
    sleep 1
done
said '/^total time/p; /^downtime:/p; /^transferred ram/p; /^throughput/p'
said '/^Time (ms):/p; /^  Throughput (Mbps):/p; /^  Transfers:/p'
echo "completed: the guest is at the destination"
