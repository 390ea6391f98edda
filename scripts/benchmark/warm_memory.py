"""warm_memory - memory that was in use a moment ago.

A virtual machine's free memory may go back to its hypervisor at once, and then costs several times as
much to touch: more than all else that is measured here. So a process of its own holds nearly all
memory, lets go of it while others take what is free, and takes it back when they have ended.
"""
import contextlib, mmap, os, pathlib, select, signal, socket, time

from . import processes
from .processes import MIB

LOW, HIGH = 224, 288  # MiB that are left free, in large pages
LEAST = 128  # of them are not used once more before a run, if as much as HIGH is free in small pieces: zones
# that devices need keep some 100 from processes
STEP = 16  # MiB that are let go, or taken back, at once
POLL = 0.003  # seconds; in them others take 30 MiB at the most
POPULATE_WRITE = 23  # madvise(2), Linux 5.14
PAGE, LARGE = 4096, 2 << 20  # bytes


holder = None  # the process, while there is one
asking = None  # our end of a socket to it


@contextlib.contextmanager
def kept():
    """As long as this lasts."""
    global holder, asking
    asking, asked = socket.socketpair()
    holder = os.fork()
    if not holder:
        asking.close()
        try:
            hold(asked)
        finally:
            os._exit(0)
    asked.close()
    try:
        yield
    finally:
        asking.close()
        os.waitpid(holder, 0)
        holder = asking = None


def held():
    """MiB."""
    return int(processes.resident_anonymous(holder)) if holder else 0


def settle():
    """Wait until no more is free than is left free, and that is warm too; MiB that are held then."""
    before, now = -1, held()
    while holder and free()[1] > HIGH and now > before:
        time.sleep(0.5)
        before, now = now, held()
    if holder:
        with contextlib.suppress(OSError):  # the kernel has ended it: nothing is warm then
            asking.send(b"?")
            asking.recv(1)
    return held()


def hold(asked):
    """The process; ends with the other end of `asked`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    # Whatever else happens, it is not a guest that the kernel ends when there is no memory left.
    pathlib.Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError):
        os.nice(-20)  # little is left free, lest it be taken back meanwhile: so it has to be in time
    size = free()[1]
    memory = mmap.mmap(-1, size << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)  # they are let go for a third of the time
    held = 0
    question = None
    while question != b"":
        question = asked.recv(1) if select.select([asked], [], [], POLL)[0] else None
        # What is left free too is used once.
        small, large = free()
        least = HIGH if not question else LEAST if small > HIGH else LOW
        # So many and no more: what we get may be small pages, which are not wanted. And others take some
        # meanwhile: all of it takes a minute, where the hypervisor had it.
        for _ in range(max(0, large - least) // STEP):
            if held + STEP > size or free()[1] < least + STEP:
                break
            memory.madvise(POPULATE_WRITE, held << 20, STEP << 20)
            held += STEP
        while free()[1] < (HIGH if question else LOW) and held:
            held -= STEP
            memory.madvise(mmap.MADV_DONTNEED, held << 20, STEP << 20)
        if question:
            asked.send(question)


def free():
    """MiB in pieces too small for a large page, and in pieces that one fits into: small ones may be all that
    is left of much memory."""
    zones = [line.split() for line in pathlib.Path("/proc/buddyinfo").read_text().splitlines()]
    # Node 0, zone Normal, and how many there are of 1, 2, 4, ... pages.
    sizes = [(PAGE << order, int(count)) for zone in zones for order, count in enumerate(zone[4:])]
    small = sum(size * count for size, count in sizes if size < LARGE)
    return small // MIB, sum(size * count for size, count in sizes) // MIB - small // MIB
