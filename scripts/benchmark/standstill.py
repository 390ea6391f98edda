"""standstill - when did the machine itself stand still?

A hypervisor that gives a virtual machine a share of its processors stops it for some hundredths of a second
when that is used up, and stops one processor while it brings memory back that it had taken. Nobody in the
machine can send then, or make up for it without sending more than he may later. So on each processor a
process that goes before all others looks whether its time passes in one piece.
"""
import contextlib, os, signal, sys, time

TICK, LEAST = 0.001, 0.005  # seconds
PRIORITY = 50


@contextlib.contextmanager
def watched():
    """Yields a list that has (begin, end) of each standstill of a processor when this is over; none where
    the kernel does not let us go first."""
    found = []
    reading, writing = os.pipe()
    watchers = [watcher(cpu, reading, writing) for cpu in os.sched_getaffinity(0)]
    os.close(writing)
    try:
        yield found
    finally:
        for process in watchers:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        with os.fdopen(reading) as lines:
            found += [tuple(map(float, line.split())) for line in lines]


def watcher(cpu, reading, writing):
    """A process that writes down when `cpu` stood still, until it is killed. Some thousand lines fit into
    the pipe."""
    process = os.fork()
    if process:
        return process
    try:
        os.close(reading)
        os.sched_setaffinity(0, [cpu])
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
        last = time.time()
        while True:
            time.sleep(TICK)
            now = time.time()
            if now - last > LEAST:
                os.write(writing, f"{last} {now}\n".encode())
            last = now
    except OSError as error:
        print(f"standstills of processor {cpu} are not seen: {error}", file=sys.stderr)
    finally:
        os._exit(1)


def within(found, begin, end):
    """Seconds between two points of time in which some processor stood still."""
    total = 0
    for since, until in sorted(found):
        since, until = max(begin, since), min(end, until)
        if since < until:
            total += until - since
            begin = until
    return total
