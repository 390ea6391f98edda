"""processes - what the kernel knows of a process: its processor time and its memory."""
import os, pathlib

TICK = 1 / os.sysconf("SC_CLK_TCK")
MIB = 1 << 20


def processor(pid, threads=()):
    """Seconds of processor time of a process and its children that have ended, without `threads`."""
    return sum(times(f"/proc/{pid}/stat")) - sum(thread_time(pid, thread) for thread in threads)


def thread_time(pid, thread):
    return sum(times(f"/proc/{pid}/task/{thread}/stat")[:2])


def times(path):
    """Seconds in user and kernel mode, then the same of children that have ended."""
    fields = pathlib.Path(path).read_text().rsplit(") ", 1)[1].split()
    return [int(field) * TICK for field in fields[11:15]]


def machine_busy():
    """Seconds that all processors together were busy since the start, whoever it was for."""
    user, nice, system, _idle, _iowait, irq, softirq = map(
        int, pathlib.Path("/proc/stat").read_text().split()[1:8]
    )
    return (user + nice + system + irq + softirq) * TICK


def children(pid):
    return [int(child) for child in read(f"/proc/{pid}/task/{pid}/children").split()]


def peak_resident(pid):
    """Greatest resident set so far, MiB."""
    return status(pid, "VmHWM:")


def resident_unmapped(pid):
    """Resident set without shared memory, MiB: where the guest's memory is mapped, all but that."""
    return status(pid, "RssAnon:") + status(pid, "RssFile:")


def resident_anonymous(pid):
    return status(pid, "RssAnon:")


def status(pid, name):
    rows = [row for row in read(f"/proc/{pid}/status").splitlines() if row.startswith(name)]
    return int(rows[0].split()[1]) / 1024 if rows else 0.0


def guest_memory(pid):
    """The file of a QEMU's memory backend; None where the guest's memory is private."""
    for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(link).startswith("/memfd:memory-backend"):
                return link
        except FileNotFoundError:
            pass  # closed in between
    return None


def nonzero(link):
    """MiB of 4 KiB pages in a file of memory that are not zero; holes are not touched."""
    page, zero, count = 4096, bytes(4096), 0
    with open(link, "rb", buffering=0) as file:
        end, at = os.fstat(file.fileno()).st_size, 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: only holes are left
                break
            stop = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            while at < stop:
                piece = os.pread(file.fileno(), min(MIB, stop - at), at)
                count += sum(
                    piece[start : start + page] != zero for start in range(0, len(piece), page)
                )
                at += len(piece)
    return count * page / MIB


def allocated(link):
    """MiB that a file of memory takes."""
    return os.stat(link).st_blocks * 512 / MIB


def memory(name):
    """MiB of the machine's memory that are MemFree, MemAvailable and the like."""
    rows = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith(f"{name}:")) // 1024


def read(path):
    """A file's text; empty if its process has ended."""
    try:
        return pathlib.Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
