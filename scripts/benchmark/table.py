"""table - what is printed while it runs, and at the end."""
from . import results

# Figure, heading, format.
COLUMNS = [
    ("total", "total s", "{:.2f}"),
    ("setup", "set-up s", "{:.3f}"),
    ("downtime", "down ms", "{:.1f}"),
    ("rate", "GiB/s", "{:.2f}"),
    ("passes", "passes", "{:.0f}"),
    ("cpu", "CPU s/GiB", "{:.3f}"),
    ("source QEMU", "QEMU src", "{:.3f}"),
    ("destination QEMU", "QEMU dst", "{:.3f}"),
    ("source helper", "help src", "{:.3f}"),
    ("destination helper", "help dst", "{:.3f}"),
    ("peak source", "peak src", "{:.1f}"),
    ("peak destination", "peak dst", "{:.1f}"),
    ("allocated destination", "dst MiB", "{:.0f}"),
    ("work", "work", "{:.2f}"),
]


def heading(first):
    return f"{first:22}" + "".join(f"{name:>10}" for _, name, _ in COLUMNS)


def cells(flat):
    return "".join(f"{format(flat.get(figure), form):>10}" for figure, _, form in COLUMNS)


def format(value, form):
    return "-" if value is None else form.format(value)


def run_line(run, memory):
    label = f"run {run['run']}  {run['contender']}"
    if "failed" in run:
        return f"{label:22}  failed: {run['failed']}"
    return f"{label:22}" + cells(results.figures(run, memory))


def conclusion(name, experiment):
    """The lines that are printed behind an experiment."""
    if name == "pacing":
        return []
    if name == "scaling":
        return fits(experiment["runs"])
    lines = medians(experiment)
    if name == "downtime":
        lines += within(experiment)
    return lines


def medians(experiment):
    """A line for each contender that ran more than once: medians, then the ranges of some."""
    lines = []
    if all(run["run"] == 1 for run in experiment["runs"]):
        return lines
    for name, row in results.summary(experiment["runs"], experiment["workload"]["memory"]).items():
        flat = {figure: values and values[0] for figure, values in row.items()}
        lines.append(f"median {name:15}" + cells(flat))
        ranges = [
            f"{heading} {form.format(row[figure][1])} to {form.format(row[figure][2])}"
            for figure, heading, form in COLUMNS
            if figure in ("total", "downtime", "cpu")
        ]
        lines.append(f"  {'range':20}" + ", ".join(ranges))
    return lines


def within(experiment):
    """How often the downtime was no longer than asked for."""
    limit, lines = experiment["workload"]["downtime_limit"], []
    for name, (kept, count) in results.kept_limits(experiment).items():
        lines.append(f"{name}: {kept} of {count} within the limit of {limit} ms")
    return lines


def fits(runs):
    """Least squares of each cost over the guest's memory."""
    return [
        f"{name:12} {figure}: {slope:.4f} {unit} per GiB + {start:.3f} {unit}, R² {quality:.4f}"
        for name, figure, unit, slope, start, quality in results.fits(runs)
    ]
