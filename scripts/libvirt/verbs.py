#!/usr/bin/env python3
"""verbs - what must hold of migrations that libvirt drives over RDMA; scripts/lab/libvirt runs it.

    verbs.py [WORD...]      only the cases whose name contains one of the words

As cases.py, with less of it: the machine is emulated, and the guest (tests/guest/dirty.S) emulated
in it. Its console has nothing but its passes; errors that it finds it counts in its memory.
"""

import os
import re
import signal

import cases
from cases import HOSTS, Events, Guest, Host, case, must

cases.PATIENCE = 600
MIB = 1 << 20
RAM = 96 * MIB  # of the guest, see scripts/libvirt/hosts
CASES = []


def passes(self, name):
    return [(int(number, 16),) * 2
            for number in re.findall(r"^([0-9a-f]{8})\r*$", self.console(name), re.M)]


Host.ticks = passes


class Dirty(Guest):
    def __init__(self, name="guest", hard_limit=1 << 30):
        with open("/mnt/guest.xml") as file:
            xml = re.sub("'KiB'>.*</hard", f"'KiB'>{hard_limit >> 10}</hard", file.read())
        with open("/mnt/guest.xml", "w") as file:
            file.write(xml)
        super().__init__(name)

    def sound(self):
        super().sound()
        said = self.at.virsh("qemu-monitor-command", self.name, "--hmp", "xp /5wx 0x1f0000").succeeds()
        numbers = [int(word, 16) for word in re.findall(r"0x([0-9a-f]{8})\b", said)]
        must(len(numbers) == 5 and numbers[1] == 1, f"the guest's memory says {said}")
        must(numbers[4] == 0, f"the guest found {numbers[4]} values changed")


def guest():
    cases.current = cases.current or Dirty()
    return cases.current


def over_rdma(here, *options):
    """A migration over the device; returns its events. Slow enough for some to be seen."""
    events = Events(here)
    here.migrate("--bandwidth", "24", *options)
    seen = events.end()
    must(seen, "there was no event")
    fabrics = {event["fabric"] for event in seen}
    must(fabrics == {"verbs"}, f"it went over {fabrics}")
    pinned = max(event["pinned"] for event in seen)
    must(pinned > 0, "nothing was registered")
    return pinned, max(event["mbps"] for event in seen)


def configure(host, change):
    """Change qemu.conf; libvirtd reads it when it starts."""
    with open(path := f"{host.dir}/etc/qemu.conf") as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(change(text))
    host.stop_daemon(signal.SIGTERM)
    host.start_daemon()
    return lambda: configure(host, lambda _: text)


def memlock(pid):
    with open(f"/proc/{pid}/limits") as file:
        return int(re.search(r"Max locked memory +\d+ +(\d+)", file.read())[1])


@case("user libvirt-qemu, private /dev, <hard_limit>", CASES)
def confined():
    here = guest()
    here.runs_here()
    daemons = os.readlink(f"/proc/{here.at.daemon()}/ns/mnt")
    must(len(here.at.helpers()) == 1, "there is no relay")
    for pid in here.at.qemus() + here.at.helpers():
        must(os.stat(f"/proc/{pid}").st_uid == 64055, f"process {pid} runs as another user")
        must(os.readlink(f"/proc/{pid}/ns/mnt") != daemons, f"process {pid} is in no namespace")
        with open(f"/proc/{pid}/cgroup") as file:
            group = file.read()
        must("guest" in group, f"process {pid} is in the group {group}")
        must(memlock(pid) == 1 << 30, f"process {pid} may lock {memlock(pid)} bytes")


@case("migrate --migrateuri rdma://, and back", CASES)
def migrate():
    here = guest()
    said = here.at.virsh("qemu-monitor-command", here.name, '{"execute":"query-rdma-helper"}').succeeds()
    must('"fabric":"verbs"' in said, said)
    rates = [over_rdma(here)[1] for _ in HOSTS]
    return f"up to {max(rates):.0f} mbps"


@case("--rdma-pin-all, and back", CASES)
def pin_all():
    here = guest()
    for _ in HOSTS:
        pinned, _ = over_rdma(here, "--rdma-pin-all")
        must(pinned >= RAM, f"only {pinned} bytes were registered")
    return f"{pinned // MIB} MiB pinned"


@case("domjobabort in mid-flight", CASES)
def abort():
    here = guest()
    command = here.migrating("--bandwidth", "2")
    here.in_flight()
    here.at.virsh("domjobabort", here.name).succeeds()
    said = command.fails("canceled by client")
    here.runs_here()
    over_rdma(here)
    return said


@case("cgroup_device_acl without /dev/infiniband", CASES)
def hidden():
    here = guest()
    restore = configure(here.other, lambda text: re.sub(r',\n.*"/dev/infiniband.*', "", text))
    try:
        said = here.migrating().fails("cgroup_device_acl in qemu.conf")
    finally:
        restore()
    here.runs_here()
    over_rdma(here)
    return said


@case("<hard_limit> too small, and raised", CASES)
def hard_limit():
    guest().destroy()
    cases.current = None
    # Enough for the messages and for what the guest has used, but not for all of its memory.
    limit = RAM + 8 * MIB
    small = Dirty("small", hard_limit=limit)
    must(memlock(small.at.helpers()[0]) == limit, "the relay has another limit")
    said = small.migrating("--rdma-pin-all").fails("<hard_limit>")
    small.runs_here()
    # Of what runs, libvirt changes the group's limit only.
    small.at.virsh("memtune", small.name, "--hard-limit", str(256 << 10), "--live").succeeds()
    must(memlock(small.at.helpers()[0]) == limit, "the relay's limit was raised")
    cases.Command(small.at, "prlimit", "--pid", str(small.at.helpers()[0]),
                  f"--memlock={256 * MIB}").succeeds()
    over_rdma(small, "--rdma-pin-all")
    must(memlock(small.at.helpers()[0]) == 256 * MIB, "the limit did not travel")
    over_rdma(small, "--rdma-pin-all")
    small.destroy()
    return said


@case("user root, no namespaces", CASES)
def root():
    guest().destroy()
    cases.current = None
    for host in HOSTS:
        configure(host, lambda text: text.replace("libvirt-qemu", "root") + "namespaces = []\n")
    here = guest()
    must(os.stat(f"/proc/{here.at.qemus()[0]}").st_uid == 0, "QEMU is not root's")
    over_rdma(here)
    over_rdma(here, "--rdma-pin-all")
    here.checks_all()
    here.destroy()
    cases.current = None


if __name__ == "__main__":
    cases.main(CASES)
