"""vcpu_stalls - when did the machine itself stand still?

A hypervisor that gives a virtual machine a share of its processors stops it for some hundredths of a second
when that is used up, and stops one processor while it brings memory back that it had taken. Nobody in the
machine can send then, or make up for it without sending more than he may later. So on each processor a
process that goes before all others looks whether its time passes in one piece.
"""
import os, signal, time

TICK, LEAST = 0.001, 0.005  # seconds
PRIORITY = 50
READY = "ready"


class Watch:
    """Sees the standstills as long as it is entered, and knows them behind that."""

    def __enter__(self):
        self.watchers, self.found = [], None
        self.reading, writing = os.pipe()
        try:
            for cpu in os.sched_getaffinity(0):
                self.watchers.append(watcher(cpu, self.reading, writing))
        except BaseException:
            os.close(writing)
            self.__exit__()
            raise
        os.close(writing)
        return self

    def __exit__(self, *_):
        for process in self.watchers:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        with os.fdopen(self.reading) as lines:
            lines = lines.read().splitlines()
        if lines.count(READY) == len(self.watchers):
            self.found = sorted(tuple(map(float, line.split())) for line in lines if line != READY)

    def within(self, begin, end):
        """Seconds between two points of time in which some processor stood still; None if nobody looked."""
        if self.found is None:
            return None
        total = 0
        for since, until in self.found:
            since, until = max(begin, since), min(end, until)
            if since < until:
                total += until - since
                begin = until
        return total


def watcher(cpu, reading, writing):
    """A process that writes down when `cpu` stood still, until it is killed or left alone. A thousand lines
    fit into the pipe."""
    parent = os.getpid()
    process = os.fork()
    if process:
        return process
    try:
        os.close(reading)
        os.sched_setaffinity(0, [cpu])
        # Not everybody may.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
        os.write(writing, f"{READY}\n".encode())
        last = time.time()
        while os.getppid() == parent:
            time.sleep(TICK)
            now = time.time()
            if now - last > LEAST:
                os.write(writing, f"{last} {now}\n".encode())
            last = now
    finally:
        os._exit(0)
