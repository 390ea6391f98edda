"""experiments - what can be measured, how often, and with whom."""
import contextlib, dataclasses, time

from . import contenders, documents, lab, machine, measure, pacing, results, table, warm_memory, workloads


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of all runs. Sizes in MiB, `limit` in seconds; None: as the experiment has it."""

    fabric: str
    address: str
    qemu: str = "10.0"
    machine: str = "q35"
    max_bandwidth: int = 100000
    downtime_limit: int | None = None
    return_path: bool = False
    limit: int = 300
    warm: bool = True
    scale: float = 1.0
    runs: int | None = None
    contenders: tuple = ()  # empty: as the experiment has it
    short: bool = False

    def chosen(self, names=()):
        """The contenders of an experiment: all that there are, or those of these names."""
        everybody = lab.contenders() if self.fabric == "verbs" else contenders.here()
        names = self.contenders or (names if self.fabric == "tcp" else ())
        return [contender for contender in everybody if not names or contender.name in names]


SETTINGS = [field.name for field in dataclasses.fields(Settings)]


def compare(workload, runs, names=()):
    """An experiment: one guest, and who is compared migrates it in alternation."""

    def experiment(settings):
        guest = workload.scaled(settings.scale)
        if settings.downtime_limit:
            guest = dataclasses.replace(guest, downtime_limit=settings.downtime_limit)
        print(table.heading(f"{guest.name}, {guest.memory} MiB"), flush=True)
        fit, left_out = measure.that_fit(settings, guest, settings.chosen(names))
        for name, why in left_out.items():
            print(f"left out: {name} {why}")

        def show(run):
            print(table.run_line(run, guest.memory), flush=True)

        rows = measure.alternate(settings, guest, fit, settings.runs or runs, show)
        return {"workload": dataclasses.asdict(guest), "left_out": left_out, "runs": rows}

    return experiment


def scaling(settings):
    """How cost grows with the guest's memory."""
    names = ("multifd-4", "helpers-1", "patched")
    points, left_out = [], {}
    for gib in (1, 2, 4, 8, 16):
        guest = workloads.SCALING.scaled(gib * settings.scale)
        sized = compare(guest, 1, names)(dataclasses.replace(settings, scale=1.0))
        points += [{**run, "memory": guest.memory} for run in sized["runs"]]
        left_out |= {f"{name}, {guest.memory} MiB": why for name, why in sized["left_out"].items()}
    return {"workload": dataclasses.asdict(workloads.SCALING), "left_out": left_out, "runs": points}


# All but those with private memory: the greatest guest has room for fewer.
SHARED = ("tcp", "multifd-2", "multifd-4", "multifd-8", "helpers-1", "helpers-2", "helpers-4", "patched")
ALL = {
    "idle": compare(workloads.IDLE, 3),
    "stress": compare(workloads.STRESS, 2, SHARED),
    "untouched": compare(workloads.UNTOUCHED, 2),
    "scaling": scaling,
    "pacing": pacing.experiment,
    "downtime": compare(workloads.DOWNTIME, 20, ("tcp", "helpers-1", "helpers-4")),
    "busy": compare(workloads.BUSY, 5),
    "lab": compare(workloads.LAB, 3),
}
FULL = ("idle", "stress", "untouched", "scaling", "pacing", "downtime")
# Of each a little: what its guest's memory is multiplied by, and who migrates.
SHORT = {
    "idle": (1 / 16, ()),
    "stress": (1 / 32, ("tcp", "helpers-1", "patched")),
    "untouched": (1 / 16, ("multifd-2", "helpers-1", "patched")),
    "scaling": (1 / 16, ("helpers-1",)),
    "pacing": (1 / 3, ("tcp", "helpers-1")),
    "downtime": (1 / 8, ("tcp", "helpers-1")),
}


def run(settings, names, out):
    """Runs the experiments, prints and writes their figures; returns the exit code."""
    document = {
        "machine": machine.describe(settings),
        "settings": dataclasses.asdict(settings),
        "experiments": {},
    }
    if settings.fabric == "verbs":
        document["baselines"] = lab.baselines(settings)
    with warm_memory.kept() if settings.warm and not settings.short else contextlib.nullcontext():
        measure_all(settings, names, document, out)
    wrong = results.failures(document) + (results.missing(document) if settings.short else [])
    for experiment, contender, what in wrong:
        print(f"bench: {experiment}, {contender}: {what}")
    return 1 if wrong else 0


def measure_all(settings, names, document, out):
    begun = time.monotonic()
    for name in names:
        these = settings
        if settings.short:
            scale, who = SHORT[name]
            these = dataclasses.replace(settings, scale=scale, contenders=who, runs=1)
        print(f"== {name}, {(time.monotonic() - begun) / 60:.1f} min from the start", flush=True)
        document["experiments"][name] = ALL[name](these)
        print("\n".join(["", *table.conclusion(name, document["experiments"][name]), ""]), flush=True)
        documents.save(out, document)  # each time: what was measured is kept if the next one fails

