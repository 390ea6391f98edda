"""host - one of the two hosts of a migration: a QEMU, and perhaps a helper beside it."""
import pathlib, re, shutil, socket, subprocess, tempfile, time

from . import processes
from .contenders import HELPER, ROOT
from .processes import MIB
from .qmp import Failed, Qmp

BOOT_TIMEOUT = 300  # seconds
THROTTLE_STEP = 20  # percent; QEMU's 10 takes twice as many passes to the same end


class Host:
    """`qemu`, `relay`: process ids, 0 for none; `own`: QEMU's monitor; `client`: management's."""

    def __init__(self, directory, name, settings, workload):
        self.directory, self.name, self.settings = directory, name, settings
        self.workload = workload
        self.incoming = name == "destination"
        self.log, self.console = directory / f"{name}.log", directory / f"{name}.console"
        self.output = open(self.log, "w")
        self.started, self.relay = [], 0

    def start(self, contender):
        self.qemu = self.spawn(self.qemu_line(contender))
        self.own = self.client = Qmp(self.path("own"))
        self.vcpus = [cpu["thread-id"] for cpu in self.own.run("query-cpus-fast")]
        if contender.destination if self.incoming else contender.source:
            line = [HELPER, "attach", "--fabric", self.settings.fabric]
            line += ["--qemu-qmp", self.path("helper"), "--qmp", self.path("qmp")]
            if contender.connections > 1:
                line += ["--connections", str(contender.connections)]
            self.relay = self.spawn(line)
            self.client = Qmp(self.path("qmp"))
        self.configure(contender)

    def path(self, kind):
        return self.directory / f"{self.name}.{kind}"

    def spawn(self, line):
        line = [str(word) for word in line]
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output)
        # Should memory end, then for what is measured here.
        pathlib.Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        self.started.append(process)
        return process.pid

    def qemu_line(self, contender):
        version = "patched" if contender.patched and not self.incoming else self.settings.qemu
        memory, machine = f"{self.workload.memory}M", self.settings.machine
        line = [ROOT / f".cache/bin/qemu-{version}", "-accel", "tcg", "-nodefaults", "-display", "none"]
        line += ["-m", memory, "-serial", f"file:{self.console}"]
        # QEMU says when each phase of the downtime ends (from 9.0 on).
        line += ["-msg", "timestamp=on", "-trace", "vmstate_downtime_checkpoint"]
        if contender.private:
            line += ["-M", machine]
        else:
            backend = f"memory-backend-memfd,id=ram,size={memory},share=on"
            line += ["-M", f"{machine},memory-backend=ram", "-object", backend]
        for kind in ("own", "helper"):
            line += ["-qmp", f"unix:{self.path(kind)},server=on,wait=off"]
        return line + self.workload.boot() + (["-incoming", "defer"] if self.incoming else [])

    def configure(self, contender):
        capabilities = {"events": True, "return-path": self.settings.return_path}
        if contender.scheme == "rdma":
            capabilities["rdma-pin-all"] = contender.pin_all
        if contender.multifd:
            capabilities["multifd"] = True
        if self.workload.throttle:
            capabilities["auto-converge"] = True
        states = [{"capability": name, "state": state} for name, state in capabilities.items()]
        self.client.run("migrate-set-capabilities", capabilities=states)
        parameters = {
            "max-bandwidth": self.settings.max_bandwidth << 20,
            "downtime-limit": self.workload.downtime_limit,
        }
        if contender.multifd:
            parameters["multifd-channels"] = contender.multifd
        if self.workload.throttle:
            parameters["cpu-throttle-initial"] = self.workload.throttle
            parameters["cpu-throttle-increment"] = THROTTLE_STEP
        self.client.run("migrate-set-parameters", **parameters)

    def await_ready(self):
        deadline = time.monotonic() + BOOT_TIMEOUT
        while not self.workload.ready(self):
            if time.monotonic() > deadline:
                raise Failed(f"The guest {self.workload.name} did not start")
            time.sleep(0.05)

    def words(self, count):
        """The first words of what dirty.elf says of itself."""
        return [int(word, 16) for word in re.findall(r"0x([0-9a-f]{8})", self.own.hmp(f"xp /{count}wx 0x1f0000"))]

    def write_memory(self, offset, length):
        """Fills guest memory with what is not zero; both in MiB, counted in its RAM block."""
        start = int(self.own.hmp("gpa2hva 0").split()[-1], 16)
        content = bytes(range(1, 256)) * (MIB // 255) + bytes(range(1, MIB % 255 + 1))
        with open(f"/proc/{self.qemu}/mem", "r+b", buffering=0) as memory:
            for mib in range(offset, offset + length):
                memory.seek(start + mib * MIB)
                memory.write(content)

    def phases(self):
        """When QEMU came to each point of its downtime, seconds since 1970."""
        found = re.findall(r"@(\d+\.\d+):vmstate_downtime_checkpoint (\S+)", self.log.read_text())
        return {name: float(when) for when, name in found}

    def qemu_time(self):
        """Processor seconds of QEMU without its vCPUs: those are the guest's."""
        return processes.processor(self.qemu, self.vcpus)

    def workers(self):
        return processes.children(self.relay) if self.relay else []

    def helper_time(self):
        """Processor seconds of the relay and of its worker, which has to end first."""
        while self.workers():
            time.sleep(0.01)
        return processes.processor(self.relay) if self.relay else 0.0

    def helper_memory(self):
        """MiB that relay and worker have had at the most."""
        resident = processes.resident_unmapped if self.settings.fabric == "verbs" else processes.peak_resident
        return sum(map(resident, [self.relay, *self.workers()])) if self.relay else 0.0

    def end(self):
        for process in reversed(self.started):
            process.kill()
            process.wait()
        self.output.close()


class Pair:
    """Source and destination on this machine; both end with the `with` statement."""

    def __init__(self, settings, workload, contender):
        self.settings, self.workload, self.contender = settings, workload, contender
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="bench-"))
        self.hosts = []

    def __enter__(self):
        try:
            for name in ("source", "destination"):
                host = Host(self.directory, name, self.settings, self.workload)
                self.hosts.append(host)
                host.start(self.contender)
            self.source, self.destination = self.hosts
            self.source.await_ready()
            self.workload.fill(self.source)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for host in self.hosts:
            host.end()
        shutil.rmtree(self.directory)

    def listen(self):
        """Makes the destination wait for the source; returns the URI."""
        with socket.socket() as probe:
            probe.bind((self.settings.address, 0))
            port = probe.getsockname()[1]
        uri = f"{self.contender.scheme}:{self.settings.address}:{port}"
        self.destination.client.run("migrate-incoming", uri=uri)
        return uri
