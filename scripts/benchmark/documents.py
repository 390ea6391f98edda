"""documents - all figures of a run of scripts/bench, as JSON."""
import json, pathlib

RESULT = "result: "  # begins the line that carries them out of the lab


def save(out, document):
    """To a file, or as a line of the output; `None`: nowhere."""
    if out == pathlib.Path("-"):
        print(f"{RESULT}{json.dumps(rounded(document))}", flush=True)
    elif out:
        out.write_text(text(rounded(document)) + "\n")


def load(path):
    return json.loads(pathlib.Path(path).read_text())


def rounded(value):
    """With four decimals: more was not measured."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def text(value, depth=0):
    """JSON with a line for each run."""
    if depth > 3 or not value or not isinstance(value, (dict, list)):
        return json.dumps(value)
    pairs = value.items() if isinstance(value, dict) else ((None, part) for part in value)
    rows = [
        " " * (depth + 1) + (f"{json.dumps(name)}: " if name else "") + text(part, depth + 1)
        for name, part in pairs
    ]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + "\n" + ",\n".join(rows) + "\n" + " " * depth + closing
