"""report - docs/performance.md: its tables and plots come from the JSON of scripts/bench.

Prose is the document's own. What stands between the lines
    <!-- NAME -->
    <!-- end -->
is made anew wherever the files have what NAME says, and left as it is elsewhere.
"""
import pathlib, re

from . import documents, pacing, plots, results, table, targets
from .contenders import ROOT

DOCUMENT = ROOT / "docs/performance.md"
DIRECTORY = ROOT / "docs/performance"


def write(files):
    """Puts the figures of the files into the document, with their plots and copies of them beside it.

    Where two files have the same experiment, the later one counts.
    """
    DIRECTORY.mkdir(exist_ok=True)
    sections, judgeable = {}, {}
    for path in map(pathlib.Path, files):
        document = documents.load(path)
        documents.save(DIRECTORY / path.name, document)
        fabric, experiments = document["settings"]["fabric"], document["experiments"]
        prefix = "" if fabric == "tcp" else f"{fabric}-"
        before = sections.get(f"{prefix}machine")
        sections[f"{prefix}machine"] = "\n\n".join(filter(None, [before, machine(path.name, document)]))
        if fabric == "tcp":
            judgeable |= experiments
        for name, experiment in experiments.items():
            sections[prefix + name] = section(prefix + name, name, experiment)
    if judgeable:
        sections["bars"] = judged(judgeable)
    old = DOCUMENT.read_text()
    places = set(re.findall(r"^<!-- ([a-z-]+) -->$", old, re.MULTILINE)) - {"end"}
    for name in sorted(sections.keys() - places):
        print(f"bench: {DOCUMENT.name} has no place for {name}")

    def replaced(match):
        return f"{match[1]}{sections[match[2]]}\n{match[4]}" if match[2] in sections else match[0]

    DOCUMENT.write_text(re.sub(r"(?ms)^(<!-- ([a-z-]+) -->\n)(.*?)^(<!-- end -->)$", replaced, old))
    return 0


def machine(name, document):
    of = document["machine"]
    lines = [
        f"[{name}](performance/{name}), {of['date']}: {of['processors']} processors ({of['processor']}), {of['memory']} MiB; "
        f"{of['system']}, Linux {of['kernel']}; {of['qemu']}; {with_patches(of)}{of['helper']}, commit `{of['commit']}`; "
        f"load at the start {of['load']:.1f}."
    ]
    if measured := document.get("baselines"):
        lines.append(
            f"`ib_write_bw` with messages of 1 MiB: {measured['ib_write_bw']:.0f} MiB/s. QEMU's stream, read and "
            f"dropped: {measured['stream']:.0f} MiB/s in the first pass."
        )
    failed = results.failures(document)
    lines += [f"Did not complete: {name}, {contender}: {why}" for name, contender, why in failed]
    return "\n\n".join(lines)


def with_patches(of):
    """The series is the commit's."""
    return f"`patched`: {of['patched']} with `qemu-patches/`; " if "patched" in of else ""


def judged(experiments):
    rows = [
        (asked, measured, "yes" if met else "**no**") for asked, measured, met in targets.rows(experiments)
    ]
    return grid(("asked for", "measured", "met"), rows)


def section(file, name, experiment):
    """Tables and plots of one experiment; the plots' names begin with `file`."""
    if name == "pacing":
        return paced(file, experiment)
    if name == "scaling":
        return scaled(file, experiment)
    summary = targets.summary(experiment)
    rows = [
        (f"`{contender}`", *(with_range(row[figure], form) for figure, _, form in table.COLUMNS))
        for contender, row in summary.items()
    ]
    parts = [grid(("", *(heading for _, heading, _ in table.COLUMNS)), rows), phases(summary)]
    if name == "downtime":
        limit = experiment["workload"]["downtime_limit"]
        counts = results.kept_limits(experiment).items()
        parts.append(", ".join(f"`{who}`: {kept} of {count} within {limit} ms" for who, (kept, count) in counts) + ".")
    parts += [f"Left out: `{who}` {why}." for who, why in experiment["left_out"].items()]
    total = [(who, [row["total"][0]], row["total"][1:]) for who, row in summary.items()]
    spent = [(who, [row[part][0] for part in results.PARTS], None) for who, row in summary.items()]
    parts.append(plot(f"{file}-total", plots.bars("Total time", "s", total)))
    parts.append(plot(f"{file}-cpu", plots.bars("Processor time", "s/GiB", spent, results.PARTS)))
    return "\n\n".join(parts)


def phases(summary):
    """The downtime's parts, medians in ms."""
    rows = []
    for contender, row in summary.items():
        parts = (row.get(f"phase {name}") for name in results.PHASES)
        rows.append((f"`{contender}`", *("-" if part is None else f"{part[0]:.1f}" for part in parts)))
    return grid(("downtime, ms", *results.PHASES), rows)


def paced(file, experiment):
    rows, series = [], {}
    for run in experiment["runs"]:
        if "failed" in run:
            continue
        for part in run["parts"]:
            rows.append((f"`{run['contender']}`", f"{part['limit']} MiB/s", pacing.describe(part)))
            series.setdefault(run["contender"], []).extend(part["windows"])
    points = [(who, [(number * pacing.STEP, ratio) for number, ratio in enumerate(row)]) for who, row in series.items() if row]
    title = "What arrived in a second, of max-bandwidth"
    return "\n\n".join(
        [
            grid(("", "limit", "windows"), rows),
            plot(file, plots.lines(title, "begin of the second, s", "ratio", points, least=0.5)),
        ]
    )


def scaled(file, experiment):
    runs = experiment["runs"]
    rows = [
        (f"`{name}`", cost, f"{slope:.3f} {unit}", f"{start:.2f} {unit}", f"{quality:.4f}")
        for name, cost, unit, slope, start, quality in results.fits(runs)
    ]
    series = {}
    for run in runs:
        if "failed" not in run:
            series.setdefault(run["contender"], []).append((run["memory"] / 1024, run["total"]))
    return "\n\n".join(
        [
            grid(("", "cost", "for each GiB", "at 0", "R²"), rows),
            *(f"Left out: `{who}` {why}." for who, why in experiment.get("left_out", {}).items()),
            plot(file, plots.lines("Total time", "guest's memory, GiB", "s", list(series.items()))),
        ]
    )


def plot(name, svg):
    (DIRECTORY / f"{name}.svg").write_text(svg)
    return f"![{name}](performance/{name}.svg)"


def with_range(values, form):
    """The median, and behind it the range where there is one."""
    if values is None:
        return "-"
    middle, least, greatest = (form.format(value) for value in values)
    return middle if least == greatest else f"{middle} ({least} to {greatest})"


def grid(heading, rows):
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
