"""pacing - does what arrives at the destination keep to `max-bandwidth`, in each second?

What arrives is counted at the loopback interface of a network namespace in which nothing but the
migration is: the packets' headers and acknowledgements count too, some 0.2 % together. The limit is
changed in mid-flight.
"""
import dataclasses, math, pathlib, time

from . import vcpu_stalls, warm_memory
from .host import Pair
from .qmp import Failed
from .workloads import PACING

CONTENDERS = ("tcp", "multifd-4", "helpers-1", "helpers-2", "helpers-4", "patched")
LIMITS = (100, 300)  # MiB a second
SAMPLE, STEP, WINDOW = 0.02, 0.1, 1.0  # seconds
LEEWAY = 0.02
SETTLE = 0.2  # QEMU limits in slices of 0.1 s


def experiment(settings):
    print(f"limits {' then '.join(map(str, LIMITS))} MiB/s", flush=True)
    rows = []
    for number in range(1, (settings.runs or 1) + 1):
        for contender in settings.chosen(CONTENDERS):
            row = {"contender": contender.name, "run": number}
            try:
                row["parts"] = migration(settings, contender)
            except (Failed, OSError) as failure:
                row["failed"] = str(failure)
            rows.append(row)
            print("\n".join(lines(row)), flush=True)
    workload = dataclasses.asdict(PACING.scaled(settings.scale))
    return {"workload": workload, "limits": LIMITS, "runs": rows}


def migration(settings, contender):
    """For each limit: what arrived in windows of a second, in proportion to the limit, and for how much of
    each a processor of the machine stood still."""
    workload = PACING.scaled(settings.scale)
    first, second = LIMITS
    with Pair(dataclasses.replace(settings, max_bandwidth=first), workload, contender) as pair:
        uri, client = pair.listen(), pair.source.client
        warm_memory.settle()
        client.run("migrate", uri=uri)
        begin = client.await_event("MIGRATION", status="active")
        # Half of the time at either limit.
        change = begin + workload.used / sum(LIMITS)
        samples, changed = [], []

        def sample():
            samples.append((time.time(), arrived()))
            if not changed and samples[-1][0] > change:
                client.run("migrate-set-parameters", **{"max-bandwidth": second << 20})
                changed.append(time.time())

        with vcpu_stalls.Watch() as watch:
            client.await_event("MIGRATION", sample, SAMPLE, status="completed")
        end = pair.source.own.await_event("STOP")
    if not changed:
        raise Failed("Completed before the limit was changed")
    parts = [(first, begin + SETTLE, change), (second, changed[0] + SETTLE, end)]
    return [
        {
            "limit": limit,
            "windows": [arrived_within(samples, at) / (limit << 20) for at in windows(begin, end)],
            "still": [watch.within(at, at + WINDOW) for at in windows(begin, end)],
        }
        for limit, begin, end in parts
    ]


def arrived():
    """Bytes that the loopback interface has received."""
    rows = pathlib.Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(row.split(":")[1].split()[0]) for row in rows if row.strip().startswith("lo:"))


def windows(begin, end):
    """The begin of each second between two points of time."""
    return [begin + number * STEP for number in range(math.floor((end - begin - WINDOW) / STEP) + 1)]


def arrived_within(samples, begin):
    """Bytes a second in the window that begins there."""
    return (counter(samples, begin + WINDOW) - counter(samples, begin)) / WINDOW


def counter(samples, when):
    """The counter at a time, between two samples of it."""
    last = samples[0]
    for sample in samples:
        if sample[0] >= when:
            share = (when - last[0]) / (sample[0] - last[0]) if sample[0] > last[0] else 0
            return last[1] + share * (sample[1] - last[1])
        last = sample
    return last[1]


def lines(row):
    """What is printed of a run."""
    label = f"run {row['run']}  {row['contender']}"
    if "failed" in row:
        return [f"{label:22}  failed: {row['failed']}"]
    return [f"{label:22}  {part['limit']} MiB/s: {describe(part)}" for part in row["parts"]]


def describe(*parts):
    """The range of all windows of parts of runs, and of those in which no processor stood still."""
    ratios = [ratio for part in parts for ratio in part["windows"]]
    if not ratios:
        return "no whole second"
    within = sum(abs(ratio - 1) <= LEEWAY for ratio in ratios) / len(ratios)
    text = (
        f"{len(ratios)} windows of a second, {min(ratios):.3f} to {max(ratios):.3f} of the limit, "
        f"{within:.0%} within 2 %"
    )
    pairs = [pair for part in parts for pair in zip(part["windows"], part.get("still", []))]
    smooth = [ratio for ratio, still in pairs if still == 0]
    if any(still for _, still in pairs):
        text += f"; a processor stood still in {len(pairs) - len(smooth)} of them"
        text += f", without these {min(smooth):.3f} to {max(smooth):.3f}" if smooth else ""
    return text
