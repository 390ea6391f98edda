"""measure - one migration from begin to end, and many of them in alternation."""
import time

from . import processes, warm_memory
from .host import Pair
from .qmp import Failed

SIDES = ("source", "destination")
SPARE = 768  # MiB that a run leaves to the machine


def needed_memory(workload, contender, qemu):
    """MiB that both QEMUs may come to: a page of shared memory is allocated when it is read.

    A source reads all of its memory; a destination all that is said to be zero, unless multifd of
    10.0 or a helper says it. Private memory that is only read takes none.
    """
    if contender.private:
        return 2 * workload.used
    sparse = contender.destination or (contender.multifd and qemu != "7.2")
    return workload.memory + (workload.used if sparse else workload.memory)


def migration(settings, workload, contender, survey):
    """Migrates once; its figures: times in seconds but the downtime in ms, sizes in MiB.

    `survey`: also how much of the guest's memory is not zero.
    """
    with Pair(settings, workload, contender) as pair:
        used = nonzero(pair.source) if survey else None
        alone = guest_pace(pair.source)
        begin = helper_times(pair)  # before the destination's worker listens
        uri = pair.listen()
        peaks = dict.fromkeys(SIDES, 0.0)
        warm = warm_memory.settle()
        begin |= state(pair)
        begun = time.time()
        pair.source.client.run("migrate", uri=uri)
        client = pair.source.client

        def sample():
            for host in pair.hosts:
                peaks[host.name] = max(peaks[host.name], host.helper_memory())
            if time.time() > begun + settings.limit:
                raise Failed(f"Not completed in {settings.limit} s")

        active = client.await_event("MIGRATION", sample, status="active")
        completed = client.await_event("MIGRATION", sample, status="completed")
        stop = pair.source.own.await_event("STOP")
        resume = pair.destination.own.await_event("RESUME")
        end = state(pair) | helper_times(pair)
        done = client.run("query-migrate")
        total = max(completed, resume) - begun
        sent = done["ram"]["transferred"] / processes.MIB
        cpu = {f"{name} {who}": end[who][name] - begin[who][name] for who in ("QEMU", "helper") for name in SIDES}
        if not workload.linux:  # whose clock stands still with it
            end["work"] = (end["work"][0], stop)
        return {
            "total": total,
            "setup": active - begun,
            "downtime": (resume - stop) * 1000,
            "phases": phases(pair, stop, resume),
            "passes": done["ram"]["dirty-sync-count"],
            "sent": sent,
            "rate": sent / 1024 / max(total - (active - begun), 1e-3),
            "cpu": cpu,
            "guest": end["guest"] - begin["guest"],
            "elsewhere": end["busy"] - begin["busy"] - sum(cpu.values()) - (end["guest"] - begin["guest"]),
            "peak": peaks,
            "allocated": {host.name: allocated(host.qemu) for host in pair.hosts},
            "work": pace(begin["work"], end["work"]) / alone if alone else None,
            "warm": warm,
            **({"nonzero": used} if used else {}),
        }


def state(pair):
    """What has been spent so far, and what the guest has done."""
    vcpus = [(host.qemu, vcpu) for host in pair.hosts for vcpu in host.vcpus]
    return {
        "QEMU": {host.name: host.qemu_time() for host in pair.hosts},
        "guest": sum(processes.thread_time(qemu, vcpu) for qemu, vcpu in vcpus),
        "work": pair.workload.work(pair.source),
        "busy": processes.machine_busy(),
    }


def helper_times(pair):
    """What the helpers have spent; waits for the end of workers."""
    return {"helper": {host.name: host.helper_time() for host in pair.hosts}}


def phases(pair, stop, resume):
    """The downtime's parts, ms, by QEMU's own account; those that it does not tell are missing.

    ram: what was dirty at the last; devices: their state; arrival: the destination has loaded all;
    resume: it runs. `stop` comes before: from the decision until the vCPUs stood still.
    """
    at = {**pair.source.phases(), **pair.destination.phases(), "stop": stop, "resume": resume}
    ends = {
        "ram": ("stop", "src-iterable-saved"),
        "devices": ("src-iterable-saved", "src-non-iterable-saved"),
        "arrival": ("src-non-iterable-saved", "dst-precopy-loadvm-completed"),
        "resume": ("dst-precopy-loadvm-completed", "resume"),
        "stop": ("src-downtime-start", "stop"),
    }
    return {
        name: (at[last] - at[first]) * 1000
        for name, (first, last) in ends.items()
        if first in at and last in at
    }


def nonzero(host):
    """MiB of the guest's memory that are not zero, before anybody has read it."""
    link = processes.guest_memory(host.qemu)
    return processes.nonzero(link) if link else None


def allocated(qemu):
    """MiB that the guest's memory takes; private memory with QEMU's own."""
    link = processes.guest_memory(qemu)
    return processes.allocated(link) if link else processes.resident_anonymous(qemu)


def guest_pace(host):
    """Work a second while nothing is migrated."""
    before = host.workload.work(host)
    time.sleep(host.workload.baseline)
    return pace(before, host.workload.work(host))


def pace(before, after):
    """Work a second between two of `Workload.work`."""
    seconds = after[1] - before[1]
    return (after[0] - before[0]) / seconds if seconds > 0 else 0.0


def alternate(settings, workload, contenders, runs, show):
    """Each contender in turn, `runs` times over, those that are not judged once; their figures."""
    results, surveyed = [], False
    for number in range(1, runs + 1):
        for contender in contenders:
            if contender.private and number > 1:
                continue
            result = {"contender": contender.name, "run": number}
            try:
                survey = not (surveyed or contender.private)
                result.update(migration(settings, workload, contender, survey))
                surveyed = surveyed or survey
            except (Failed, OSError) as failure:
                result["failed"] = str(failure)
            results.append(result)
            show(result)
    return results


def that_fit(settings, workload, contenders):
    """(contenders whose run has room on this machine, why the others are left out)."""
    available = processes.memory("MemAvailable") + warm_memory.held() - SPARE
    fit, left_out = [], {}
    for contender in contenders:
        needed = needed_memory(workload, contender, settings.qemu)
        if needed <= available:
            fit.append(contender)
        else:
            left_out[contender.name] = f"needs {needed} MiB, {available} MiB are free"
    return fit, left_out
