"""results - what many runs say together: medians, ranges, ratios, fits."""
import statistics

PARTS = ("source QEMU", "destination QEMU", "source helper", "destination helper")

PHASES = ("stop", "ram", "devices", "arrival", "resume")  # of the downtime; the first before it


def figures(run, memory):
    """One run as flat figures; processor time in seconds for each GiB of the guest's `memory` (MiB)."""
    gib = memory / 1024
    flat = {name: run[name] for name in ("total", "setup", "downtime", "passes", "sent", "rate")}
    flat |= {name: run["cpu"][name] / gib for name in PARTS}
    flat["cpu"] = sum(run["cpu"].values()) / gib
    flat |= {f"peak {side}": peak for side, peak in run["peak"].items()}
    flat |= {f"allocated {side}": mib for side, mib in run["allocated"].items()}
    flat |= {f"phase {name}": part for name, part in run["phases"].items()}
    flat["work"] = run["work"]
    return flat


def summary(runs, memory):
    """{contender: {figure: (median, least, greatest)}} of the runs that completed."""
    table = {}
    for name in dict.fromkeys(run["contender"] for run in runs):
        rows = [figures(run, memory) for run in runs if run["contender"] == name and "failed" not in run]
        if rows:
            table[name] = {figure: spread([row.get(figure) for row in rows]) for figure in rows[0]}
    return table


def spread(values):
    """(median, least, greatest) of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return (statistics.median(known), min(known), max(known)) if known else None


def median(table, name, figure):
    """Of one contender, or None."""
    values = table.get(name, {}).get(figure)
    return values[0] if values else None


def best(table, names, figure):
    """(contender, median) of the least."""
    found = [(median(table, name, figure), name) for name in names]
    found = [pair for pair in found if pair[0] is not None]
    return min(found)[::-1] if found else (None, None)


def fit(points):
    """Least squares of y over x: (slope, intercept, R²)."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    slope, intercept = statistics.linear_regression(xs, ys)
    spread_of_ys = len(set(ys)) > 1
    return slope, intercept, statistics.correlation(xs, ys) ** 2 if spread_of_ys else 1.0


def kept_limits(experiment):
    """{contender: (runs whose downtime was within the limit, runs)}."""
    limit, counts = experiment["workload"]["downtime_limit"], {}
    for run in experiment["runs"]:
        if "failed" not in run:
            kept, count = counts.get(run["contender"], (0, 0))
            counts[run["contender"]] = (kept + (run["downtime"] <= limit), count + 1)
    return counts


def fits(runs):
    """(contender, cost, unit, slope, intercept, R²) of each cost over the guest's memory in GiB."""
    costs = {
        "total": ("s", lambda run: run["total"]),
        "CPU": ("s", lambda run: sum(run["cpu"].values())),
        "helper peak": ("MiB", lambda run: max(run["peak"].values())),
    }
    rows = []
    for name in dict.fromkeys(run["contender"] for run in runs):
        done = [run for run in runs if run["contender"] == name and "failed" not in run]
        for cost, (unit, value) in costs.items():
            points = [(run["memory"] / 1024, value(run)) for run in done]
            if len({memory for memory, _ in points}) > 1:
                rows.append((name, cost, unit, *fit(points)))
    return rows


def missing(document):
    """Figures that a run lacks that came to its end: (experiment, contender, figure)."""
    lacking = []
    for name, experiment in document["experiments"].items():
        for run in experiment["runs"]:
            if "failed" in run:
                continue
            if "parts" in run:
                wanting = [f"{part['limit']} MiB/s" for part in run["parts"] if not part["windows"]]
            else:
                flat = figures(run, experiment["workload"]["memory"])
                names = [figure for figure, value in flat.items() if value is None]
                wanting = names + [f"phase {phase}" for phase in PHASES if f"phase {phase}" not in flat]
            lacking += [(name, run["contender"], figure) for figure in wanting]
    return lacking


def failures(document):
    """Each run that did not come to its end: (experiment, contender, why)."""
    return [
        (name, run["contender"], run["failed"])
        for name, experiment in document["experiments"].items()
        for run in experiment["runs"]
        if "failed" in run
    ]
