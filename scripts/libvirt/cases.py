#!/usr/bin/env python3
"""cases - what must hold of migrations that libvirt drives; scripts/libvirt/test runs it.

    cases.py [WORD...]      only the cases whose name contains one of the words

Each case is what an operator types, and what must be seen then: as a rule that the guest runs at
exactly one host, that its console goes on from where it was, and that it found its memory as it
had left it (tests/guest/init.c). The guest of one case is that of the next, at whichever host.
"""

import glob
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback

EMULATOR = "/usr/bin/qemu-system-x86_64-rdma"
PATIENCE = 60  # seconds for anything that is awaited


class Failed(Exception):
    """Something that must hold does not."""


def must(condition, what):
    if not condition:
        raise Failed(what)


def eventually(what, condition):
    """Wait until condition() gives something."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        must(time.monotonic() < deadline, f"timed out waiting for {what}")
        time.sleep(0.05)
    return result


class Command:
    """Something that was typed at a host, and what it printed so far."""

    def __init__(self, host, *words):
        self.line = shlex.join(words)
        self.began = time.monotonic()
        self.output = f"/mnt/output-{time.monotonic_ns()}"
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                ["on", str(host.number), *words],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)

    def text(self):
        with open(self.output) as file:
            return file.read().strip()

    def end(self):
        """Wait for its end; returns whether it succeeded."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Failed(f"'{self.line}' does not end: {self.text()}") from None
        self.took = time.monotonic() - self.began
        return code == 0

    def succeeds(self):
        must(self.end(), f"'{self.line}' failed: {self.text()}")
        return self.text()

    def fails(self, *texts):
        """It must fail, and say each of these; returns the line that says the first."""
        must(not self.end(), f"'{self.line}' did not fail: {self.text()}")
        for text in texts:
            must(text in self.text(), f"'{self.line}' does not say '{text}': {self.text()}")
        said = next(line for line in self.text().splitlines() if texts[0] in line)
        return said.removeprefix("error: ")


def arguments(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""  # it has just ended


class Host:
    def __init__(self, number):
        self.number = number
        self.dir = f"/mnt/{number}"
        with open(f"{self.dir}/pid") as file:
            self.name = os.readlink(f"/proc/{file.read().strip()}/ns/uts")

    def __str__(self):
        return f"host{self.number}"

    def virsh(self, *words):
        return Command(self, "virsh", *words)

    def processes(self, pattern):
        """Processes of this host whose name or program matches."""
        found = []
        for path in glob.glob("/proc/[0-9]*"):
            try:
                if os.readlink(f"{path}/ns/uts") != self.name:
                    continue
                with open(f"{path}/comm") as file:
                    names = [file.read().strip(), os.readlink(f"{path}/exe")]
            except OSError:
                continue  # it has just ended
            if any(re.search(pattern, name) for name in names):
                found.append(int(path.removeprefix("/proc/")))
        return found

    def qemus(self):
        """QEMUs with a guest, not those that libvirt probes."""
        return [pid for pid in self.processes("^/usr/bin/qemu-system") if b"guest=" in arguments(pid)]

    def helpers(self):
        return self.processes("/qemu-rdma-helper$")

    def domains(self):
        return self.virsh("list", "--all", "--name").succeeds().split()

    def state(self, name):
        return self.virsh("domstate", "--reason", name).succeeds()

    def console(self, name):
        try:
            with open(f"{self.dir}/log/console/{name}", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def ticks(self, name):
        """(tick, passes) of each whole line that the guest said here."""
        return [tuple(map(int, line)) for line in re.findall(
            r"^tick (\d+) passes (\d+) reads \d+ ok\r*\n", self.console(name), re.M)]

    def last(self, name):
        return max(self.ticks(name), default=(0, 0))

    def daemon(self):
        with open(f"{self.dir}/run/libvirtd.pid") as file:
            return int(file.read())

    def start_daemon(self):
        Command(self, "libvirtd", "--listen", "--daemon").succeeds()

    def stop_daemon(self, how):
        pid = self.daemon()
        os.kill(pid, how)
        eventually("libvirtd's end", lambda: not os.path.exists(f"/proc/{pid}"))


HOSTS = [Host(1), Host(2)]


class Guest:
    def __init__(self, name="guest", emulator=EMULATOR):
        self.name = name
        self.at, self.other = HOSTS
        with open("/mnt/guest.xml") as file:
            xml = file.read()
        xml = xml.replace("<name>guest<", f"<name>{name}<").replace("/console/guest'", f"/console/{name}'")
        xml = re.sub("<emulator>.*</emulator>", f"<emulator>{emulator}</emulator>", xml)
        with open(f"/mnt/{name}.xml", "w") as file:
            file.write(xml)
        for console in glob.glob(f"/mnt/[12]/log/console/{name}"):
            os.unlink(console)
        self.at.virsh("create", f"/mnt/{name}.xml").succeeds()
        eventually("the guest's first pass", lambda: self.at.last(name)[1] >= 1)

    def migrating(self, *options, uri="rdma"):
        if uri == "rdma":
            uri = f"rdma://{self.other}"
        words = ["migrate", "--live", self.name, f"qemu+tcp://{self.other}/system"]
        return self.at.virsh(*words, *(["--migrateuri", uri] if uri else []), *options)

    def migrate(self, *options, uri="rdma"):
        command = self.migrating(*options, uri=uri)
        command.succeeds()
        self.moved()
        return command

    def moved(self):
        self.at, self.other = self.other, self.at
        self.runs_here()

    def job(self):
        """What domjobinfo says, sizes as bytes."""
        units = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
        command = self.at.virsh("domjobinfo", self.name)
        return {} if not command.end() else {
            key: float(value) * units[unit] for key, value, unit in
            re.findall(r"^(.*?):\s+([\d.]+) ([KMG]?i?B)(?:/s)?\s*$", command.text(), re.M)}

    def in_flight(self):
        """Wait until a migration has brought some of the guest's memory over."""
        eventually("the migration's first 4 MiB",
                   lambda: self.job().get("Memory processed", 0) > 4 << 20)

    def runs_here(self):
        """The guest runs at its host, at no other, and goes on from where it was."""
        state = self.at.state(self.name)
        must(state.startswith("running"), f"its state at {self.at} is {state}")
        must(self.name not in self.other.domains(), f"{self.other} has it too")
        eventually(f"the end of QEMU at {self.other}", lambda: not self.other.qemus())
        eventually(f"the end of the helper at {self.other}", lambda: not self.other.helpers())
        must(len(self.at.qemus()) == 1, f"{len(self.at.qemus())} QEMUs at {self.at}")
        last = max(host.last(self.name) for host in HOSTS)
        eventually("the guest's next words", lambda: self.at.last(self.name) > last)
        self.sound()

    def sound(self):
        consoles = "".join(host.console(self.name) for host in HOSTS)
        must("MISMATCH" not in consoles, "the guest found its memory changed")
        must("Kernel panic" not in consoles, "the guest's kernel died")
        ticks = [tick for host in HOSTS for tick, _ in host.ticks(self.name)]
        must(len(ticks) == len(set(ticks)), "the guest ran twice")

    def checks_all(self):
        """Let the guest look at all that it wrote."""
        last = self.at.last(self.name)[1]
        eventually("two passes", lambda: self.at.last(self.name)[1] >= last + 2)
        self.sound()

    def destroy(self):
        self.at.virsh("destroy", self.name).succeeds()
        nothing_left()


def nothing_left():
    for host in HOSTS:
        eventually(f"the end of all at {host}",
                   lambda: not host.domains() and not host.qemus() and not host.helpers())


class Events:
    """The helper's events, as virsh shows them."""

    def __init__(self, guest):
        self.command = guest.at.virsh("qemu-monitor-event", "--domain", guest.name, "--loop",
                                      "--timestamp", "--event", "RDMA_MIGRATION_THROUGHPUT")

    def seen(self):
        return [json.loads(data) for data in
                re.findall(r"for domain '.*?': (\{.*\})$", self.command.text(), re.M)]

    def first(self, what, condition=bool):
        return eventually(what, lambda: [e for e in self.seen() if condition(e)])[0]

    def end(self):
        self.command.process.terminate()
        self.command.process.wait()
        return self.seen()


CASES = []


def case(name, cases=CASES):
    def add(function):
        cases.append((name, function))
        return function
    return add


current = None


def guest():
    """The guest of the cases, started where there is none."""
    global current
    current = current or Guest()
    return current


@case("tcp: without the helper; with it from --xml on")
def stock():
    plain = Guest("plain", "/usr/bin/qemu-system-x86_64")
    plain.migrate(uri=None)
    with open("/mnt/plain.changed.xml", "w") as file:
        xml = plain.at.virsh("dumpxml", "--migratable", plain.name).succeeds()
        file.write(xml.replace("/usr/bin/qemu-system-x86_64<", f"{EMULATOR}<"))
    plain.migrate("--xml", "/mnt/plain.changed.xml", uri=None)
    plain.migrate()
    plain.destroy()


@case("probing: domcapabilities --emulatorbin")
def probing():
    said = HOSTS[0].virsh("domcapabilities", "--virttype", "qemu", "--emulatorbin", EMULATOR).succeeds()
    must(f"<path>{EMULATOR}</path>" in said and "<domain>qemu</domain>" in said, said)
    nothing_left()


@case("create: <emulator> is the helper's link")
def create():
    here = guest()
    here.runs_here()
    must(here.at.helpers(), "there is no helper")


@case("accounting: processor time is QEMU's")
def accounting():
    here = guest()
    stats = here.at.virsh("domstats", "--vcpu", here.name).succeeds()
    vcpu = int(re.search(r"vcpu.0.time=(\d+)", stats)[1]) / 1e9
    info = here.at.virsh("dominfo", here.name).succeeds()
    told = float(re.search(r"CPU time:\s+([\d.]+)s", info)[1])
    with open(f"/proc/{here.at.qemus()[0]}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    must(used > 1, f"booting took QEMU {used} s only")
    must(abs(told - used) < 0.5, f"dominfo says {told} s, it is {used} s")
    must(used / 2 < vcpu <= used, f"domstats says {vcpu} s of {used} s are the vCPU's")
    return f"dominfo {told} s, vCPU {vcpu} s, QEMU {used} s"


@case("migrate --migrateuri rdma://")
def migrate():
    return f"{guest().migrate().took:.1f} s"


@case("ten migrations to and fro")
def to_and_fro():
    took = [guest().migrate().took for _ in range(10)]
    guest().checks_all()
    return f"{min(took):.1f} to {max(took):.1f} s each"


@case("tcp: through the helper")
def tcp_through_helper():
    guest().migrate(uri=None)


@case("migrate --p2p")
def p2p():
    guest().migrate("--p2p")


@case("save and restore")
def save():
    here = guest()
    here.at.virsh("save", here.name, "/var/lib/libvirt/saved").succeeds()
    nothing_left()
    here.at.virsh("restore", "/var/lib/libvirt/saved").succeeds()
    here.runs_here()


@case("domjobinfo, --verbose, events")
def progress():
    here = guest()
    events = Events(here)
    command = here.migrating("--verbose", "--bandwidth", "16")
    events.first("a throughput", lambda event: event["mbps"] > 0)
    job = eventually("a memory bandwidth",
                     lambda: (job := here.job()).get("Memory bandwidth") and job)
    event = events.seen()[-1]
    must(job["Memory total"] >= 256 << 20, job)
    here.at.virsh("migrate-setspeed", here.name, "1000").succeeds()
    shown = set(re.findall(r"Migration: \[\s*([\d.]+) %\]", command.succeeds()))
    here.moved()
    events.end()
    must(len(shown) > 1, f"--verbose shows no progress: {shown}")
    mib, rates = 1 << 20, (job["Memory bandwidth"], event["mbps"] * 1e6 / 8)
    must(max(rates) < 1.2 * min(rates), f"domjobinfo and the event say {rates} bytes per second")
    return (f"domjobinfo {job['Memory bandwidth'] / mib:.1f} MiB/s, "
            f"event {event['mbps']:.1f} mbps = {event['mbps'] * 1e6 / 8 / mib:.1f} MiB/s")


@case("--rdma-pin-all")
def pin_all():
    here = guest()
    events = Events(here)
    here.migrate("--rdma-pin-all", "--bandwidth", "40")
    pinned = {"capability": "rdma-pin-all", "state": True}
    must(pinned in events.first("an event")["capabilities"], events.seen())
    events.end()


@case("--bandwidth, migrate-setspeed in mid-flight")
def bandwidth():
    here = guest()
    events = Events(here)
    command = here.migrating("--bandwidth", "8")
    slow = events.first("8 MiB/s", lambda e: e["max-bandwidth"] == 8 << 20 and e["mbps"] > 0)
    must(slow["mbps"] * 1e6 / 8 < 1.25 * (8 << 20), f"faster than 8 MiB/s: {slow}")
    must(command.process.poll() is None, "it ended before its speed was set")
    here.at.virsh("migrate-setspeed", here.name, "500").succeeds()
    command.succeeds()
    here.moved()
    fast = events.first("500 MiB/s", lambda e: e["max-bandwidth"] == 500 << 20)
    peak = max(event["mbps"] for event in events.end())
    must(peak > 1.5 * slow["mbps"], f"no faster than before: {peak}")
    return f"{slow['mbps']:.0f} mbps, then up to {peak:.0f} ({fast['fabric']})"


def fails_in_flight(action, *texts):
    """Something ends a migration in mid-flight: the guest keeps running here, and the next one works."""
    here = guest()
    command = here.migrating("--bandwidth", "4")
    here.in_flight()
    action(here)
    said = command.fails(*texts)
    here.runs_here()
    here.migrate()
    return said


@case("domjobabort in mid-flight")
def abort():
    return fails_in_flight(lambda here: here.at.virsh("domjobabort", here.name).succeeds(),
                           "canceled by client")


def refused(here, says, *options, uri="rdma"):
    """A migration is refused at once: the guest keeps running here."""
    command = here.migrating(*options, uri=uri)
    said = command.fails(says)
    must(command.took < 5, f"it took {command.took:.1f} s to be refused")
    here.runs_here()
    return said


@case("refused: nothing listens")
def nothing_listens():
    return refused(guest(), "Connection refused", uri=f"rdma://{guest().at}")


@case("refused: --parallel")
def parallel():
    return refused(guest(), "multifd", "--parallel", "--parallel-connections", "2")


@case("refused: --parallel --zerocopy")
def zerocopy():
    return refused(guest(), "multifd", "--parallel", "--zerocopy")


@case("refused: --compressed")
def compressed():
    return refused(guest(), "xbzrle", "--compressed")


@case("refused: --postcopy")
def postcopy():
    # By the helper, or before by QEMU where its user may not have userfaultfd; see `script`.
    return refused(guest(), "ostcopy", "--postcopy")


@case("destination's QEMU killed")
def destination_killed():
    return fails_in_flight(lambda here: os.kill(here.other.qemus()[0], signal.SIGKILL), "error:")


def kill_worker(host):
    os.kill(host.processes("^rdma-worker$")[0], signal.SIGKILL)


@case("source's worker killed")
def source_worker_killed():
    return fails_in_flight(lambda here: kill_worker(here.at), "worker process died")


@case("destination's worker killed")
def destination_worker_killed():
    return fails_in_flight(lambda here: kill_worker(here.other), "error:")


@case("source's libvirtd killed and started again")
def libvirtd_killed():
    here = guest()
    command = here.migrating("--bandwidth", "4")
    here.in_flight()
    here.at.stop_daemon(signal.SIGKILL)
    must(not command.end(), "the migration succeeded without libvirtd")
    here.at.start_daemon()
    eventually("the end of the migration",
               lambda: "None" in here.at.virsh("domjobinfo", here.name).succeeds())
    here.runs_here()
    here.migrate()


@case("user libvirt-qemu, in libvirt's mount namespace")
def unprivileged():
    here = guest()
    command = here.migrating("--bandwidth", "4")
    here.in_flight()
    for host in HOSTS:
        daemons = os.readlink(f"/proc/{host.daemon()}/ns/mnt")
        must(len(host.helpers()) == 2, f"no relay and worker at {host}")
        for pid in host.qemus() + host.helpers():
            must(os.stat(f"/proc/{pid}").st_uid == 64055, f"process {pid} runs as another user")
            must(os.readlink(f"/proc/{pid}/ns/mnt") != daemons, f"process {pid} is in no namespace")
    here.at.virsh("migrate-setspeed", here.name, "1000").succeeds()
    command.succeeds()
    here.moved()


@case("destroy leaves nothing")
def destroy():
    global current
    here, current = guest(), None
    here.checks_all()
    here.destroy()


@case("shutdown by the guest leaves nothing")
def shutdown():
    global current
    here, current = guest(), None
    here.at.virsh("inject-nmi", here.name).succeeds()  # it panics, reboots, and on_reboot says destroy
    nothing_left()


@case("relay killed: the domain has crashed")
def relay_killed():
    global current
    here, current = guest(), None
    os.kill(here.at.helpers()[0], signal.SIGKILL)
    nothing_left()


@case("script as <emulator>, user root, no namespaces")
def script():
    for host in HOSTS:
        with open(conf := f"{host.dir}/etc/qemu.conf") as file:
            text = file.read().replace("libvirt-qemu", "root") + "namespaces = []\n"
        with open(conf, "w") as file:
            file.write(text)
        host.stop_daemon(signal.SIGTERM)
        host.start_daemon()
    path = "/usr/local/bin/qemu-over-tcp"
    with open(path, "w") as file:
        file.write("#!/bin/sh\nexec qemu-rdma-helper run --fabric tcp -- "
                   '/usr/bin/qemu-system-x86_64 "$@"\n')
    os.chmod(path, 0o755)
    other = Guest("scripted", path)
    must(os.stat(f"/proc/{other.at.qemus()[0]}").st_uid == 0, "QEMU is not root's")
    refused(other, "'postcopy-ram' can't be combined with rdma:", "--postcopy")
    other.migrate()
    other.migrate()
    other.checks_all()
    other.destroy()


def show_logs():
    for path in sorted(glob.glob("/mnt/[12]/log/libvirtd.log") + glob.glob("/mnt/[12]/log/qemu/*")):
        with open(path, errors="replace") as file:
            print(f"--- {path}", *file.read().splitlines()[-25:], sep="\n", file=sys.stderr)


def main(cases=CASES):
    global current
    began, failed = time.monotonic(), 0
    chosen = [c for c in cases if len(sys.argv) == 1 or any(word in c[0] for word in sys.argv[1:])]
    for name, run in chosen:
        start = time.monotonic()
        try:
            note, result = run() or "", "ok"
        except Exception as error:  # whatever it was, the next case gets a guest of its own
            note, result = str(error), "FAILED"
            failed += 1
            if not isinstance(error, Failed):
                traceback.print_exc()
            show_logs()
            for host in HOSTS:
                for domain in host.domains():
                    host.virsh("destroy", domain).end()
            current = None
        print(f"{result:6} {time.monotonic() - start:5.1f} s  {name:47}  {note}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} cases ok, {time.monotonic() - began:.0f} s")
    sys.exit(1 if failed or not chosen else 0)


if __name__ == "__main__":
    main()
