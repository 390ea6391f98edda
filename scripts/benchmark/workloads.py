"""workloads - the guests that are migrated, and what they are busy with.

idle       all of its memory is in use, and the guest does nothing
stress     a real Linux that does what `stress --vm 1 --vm-bytes N --vm-keep` does: one byte of each
           page of N, for ever (tests/guest/init.c)
untouched  most of its memory was never used, and the guest does nothing
busy       a part of its memory is in use, and a part of that kept being written
"""
import dataclasses, pathlib, re, time

ROOT = pathlib.Path(__file__).resolve().parents[2]
GUEST = ROOT / ".cache/guest"

# MiB: where dirty.elf begins to fill memory, and how much of it lies below the devices on any machine.
BASE, REACH = 4, 2040


@dataclasses.dataclass(frozen=True)
class Workload:
    name: str
    memory: int  # MiB, of the guest
    used: int  # MiB that are not zero
    hot: int = 0  # MiB of these that are kept being written
    spin: int = 0  # pause behind each page that is written, in turns of a loop
    linux: bool = False
    downtime_limit: int = 300  # ms
    throttle: int = 0  # percent that QEMU's auto-converge begins with, 0: without it

    @property
    def baseline(self):
        """Seconds that tell what the guest does by itself: for Linux a pass over all of its memory."""
        return 4 if self.linux else 1

    def scaled(self, factor):
        """The same with less memory, or more; in whole MiB. Linux keeps what it needs itself."""
        used, hot = round(self.used * factor), round(self.hot * factor)
        own = self.memory - self.used
        memory = used + own if self.linux else round(self.memory * factor)
        return dataclasses.replace(self, memory=memory, used=used, hot=hot)

    def boot(self):
        """QEMU's arguments that start it."""
        if not self.linux:
            line = f"{min(self.used, REACH)} {self.hot} {self.spin}"
            return ["-kernel", str(GUEST / "dirty.elf"), "-append", line]
        # no_timer_check: on a loaded machine an emulated timer is late, and the kernel gives up.
        line = f"console=ttyS0 quiet mitigations=off no_timer_check stress={self.used}"
        return ["-kernel", str(GUEST / "vmlinuz"), "-initrd", str(GUEST / "initrd"), "-append", line]

    def fill(self, host):
        """Uses from outside what dirty.elf, which has 32 bits, does not reach."""
        if not self.linux and self.used > REACH:
            host.write_memory(BASE + REACH, self.used - REACH)

    def ready(self, host):
        """All of its memory that it uses itself has been written once."""
        if self.linux:
            return bool(stress_lines(host))
        return host.words(2) == [0x44495254, 1]

    def work(self, host):
        """(what the guest has done so far, at this second): turns of what it is busy with."""
        if self.linux:
            return stress_lines(host)[-1]
        passes, writes = host.words(5)[2:4]
        return (writes if self.hot else passes), time.time()


def stress_lines(host):
    """(MiB written and checked, the guest's clock in seconds) of each line on the console that says so."""
    lines = re.findall(r"^work (\d+) MiB at (\d+) ms\r?$", host.console.read_text(), re.MULTILINE)
    return [(int(work), int(clock) / 1000) for work, clock in lines]


# A small limit, so that the downtime is not the rest of the first pass.
IDLE = Workload("idle", memory=4096, used=4060, downtime_limit=30)
UNTOUCHED = Workload("untouched", memory=16384, used=300, downtime_limit=30)
BUSY = Workload("busy", memory=4096, used=1024, hot=16, spin=20000, downtime_limit=30)
STRESS = Workload("stress", memory=8192, used=7500, linux=True, throttle=50)
# What is dirty at a time takes about as long as the limit, so QEMU's estimate decides.
DOWNTIME = Workload("downtime", memory=1024, used=800, hot=256, spin=3000, downtime_limit=100)
# A quarter is in use, so that 16 GiB of it fit twice into a machine of 24.
SCALING = Workload("scaling", memory=1024, used=256, downtime_limit=30)
# The lab's two processors are emulated, and its memory is 4 GiB.
LAB = Workload("lab", memory=256, used=128, hot=4, spin=20000)
PACING = Workload("pacing", memory=2048, used=2000, downtime_limit=30)
