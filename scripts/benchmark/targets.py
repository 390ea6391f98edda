"""targets - what the helpers have to reach beside QEMU by itself, and what they did.

Ours is in each workload the helpers' number of connections with the least total time, and stays it in
all of the workload's targets; the peer is the best of QEMU's tcp: and multifd in the figure at hand.
"""
from . import pacing as paced, results

PEERS = ("tcp", "multifd-2", "multifd-4", "multifd-8")
HELPERS = ("helpers-1", "helpers-2", "helpers-4")


def rows(experiments):
    """(what is asked for, what was measured, whether that does) of all bars that have figures."""
    found = []
    for name, experiment in experiments.items():
        if name in JUDGES:
            found += JUDGES[name](experiment)
    return found


def idle(experiment):
    table = summary(experiment)
    ours, _ = results.best(table, HELPERS, "total")
    found = [
        ratio("Idle guest: total time", table, ours, "total", 0.6),
        ratio("Idle guest: processor time", table, ours, "cpu", 0.7),
        *downtimes("Idle guest", table, ours),
    ]
    if "patched" in table:
        parts = [results.median(table, "patched", part) for part in ("source QEMU", "source helper")]
        measured = f"{sum(parts):.3f} s/GiB"
        found.append(("Patched QEMU: processor time at the source at most 0.15 s/GiB", measured, sum(parts) <= 0.15))
    return found


def stress(experiment):
    table = summary(experiment)
    ours, _ = results.best(table, HELPERS, "total")
    return [
        ratio("Stressed guest: converges, total time", table, ours, "total", 0.7),
        *downtimes("Stressed guest", table, ours),
    ]


def untouched(experiment):
    table = summary(experiment)
    ours, _ = results.best(table, HELPERS, "total")
    found = [
        ratio("Untouched memory: total time", table, ours, "total", 0.8),
        *downtimes("Untouched memory", table, ours),
    ]
    used = next((run["nonzero"] for run in experiment["runs"] if "nonzero" in run), None)
    if used is None:
        return found
    for name, sides in ((ours, ("destination",)), ("patched", ("source", "destination"))):
        for side in sides:
            taken = results.median(table, name, f"allocated {side}")
            if taken is not None:
                asked = f"Untouched memory, {name}: at most 1.05 of the pages that are not zero, {side}"
                found.append((asked, f"{taken:.0f} MiB of {used:.0f} MiB", taken <= 1.05 * used))
    return found


def limits(experiment):
    counts = results.kept_limits(experiment)
    if "tcp" not in counts:
        return []
    peer = counts["tcp"]
    table = summary(experiment)
    ours, _ = results.best(table, HELPERS, "total")
    return downtimes("Busy guest, limit of 100 ms", table, ours) + [
        (
            f"Downtime within the limit as often as tcp, {name}",
            f"{kept} of {count}, tcp {peer[0]} of {peer[1]}",
            kept * peer[1] >= peer[0] * count,
        )
        for name, (kept, count) in counts.items()
        if name != "tcp"
    ]


def pacing(experiment):
    found = []
    for name in (*HELPERS, "patched"):
        parts = [
            part
            for run in experiment["runs"]
            if run["contender"] == name and "failed" not in run
            for part in run["parts"]
        ]
        ratios = [ratio for part in parts for ratio in part["windows"]]
        if ratios:
            kept = all(abs(ratio - 1) <= paced.LEEWAY for ratio in ratios)
            found.append((f"`max-bandwidth` within 2 % in any second, {name}", paced.describe(*parts), kept))
    return found


def scaling(experiment):
    found = []
    for name, cost, unit, slope, start, quality in results.fits(experiment["runs"]):
        if name.startswith("multifd"):
            continue
        measured = f"{slope:.3f} {unit} per GiB + {start:.2f} {unit}, R² {quality:.3f}"
        missing = [who for who in experiment.get("left_out", {}) if who.split(",")[0] == name]
        measured += "".join(f"; left out: {who}" for who in missing)
        if cost == "helper peak":  # 1 MiB over the 15 GiB
            asked, met = f"The helper's memory does not grow with RAM, {name}", slope < 1 / 15
        else:
            asked, met = f"{cost} grows linearly with RAM (R² at least 0.98), {name}", quality >= 0.98
        found.append((asked, measured, met and not missing))
    return found


JUDGES = {
    "idle": idle,
    "stress": stress,
    "untouched": untouched,
    "scaling": scaling,
    "pacing": pacing,
    "downtime": limits,
}


def summary(experiment):
    return results.summary(experiment["runs"], experiment["workload"]["memory"])


def ratio(what, table, ours, figure, most):
    """Ours in proportion to the best peer's."""
    peer, least = results.best(table, PEERS, figure)
    mine = results.median(table, ours, figure)
    what = f"{what} at most {most} of the best peer's"
    if not least or mine is None:
        return (what, "not measured", False)
    return (what, f"{mine / least:.2f} ({ours} {mine:.3g}, {peer} {least:.3g})", mine / least <= most)


def downtimes(guest, table, ours):
    return [downtime(guest, table, name) for name in (ours, "patched") if name in table]


def downtime(guest, table, ours):
    peer, least = results.best(table, PEERS, "downtime")
    mine = results.median(table, ours, "downtime")
    what = f"{guest}{', patched' if ours == 'patched' else ''}: downtime at most the best peer's and 5 ms"
    if least is None or mine is None:
        return (what, "not measured", False)
    return (what, f"{ours} {mine:.1f} ms, {peer} {least:.1f} ms", mine <= least + 5)
