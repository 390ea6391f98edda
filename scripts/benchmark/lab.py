"""lab - the same over RDMA, on the soft-RoCE device of scripts/lab.

Before the migrations: what ib_write_bw reaches on the device, and QEMU's stream by itself, which is
the measure of what a source's helper can reach.
"""
import json, os, shlex, socket, statistics, subprocess, sys, threading, time

from . import documents
from .contenders import Contender, PATCHED, ROOT, helpers
from .host import Pair
from .workloads import LAB

ADDRESS = "10.77.0.1"


def contenders():
    """QEMU's own, the helpers', and one end of each; with all memory pinned at the start and without. Then
    what helpers have beyond that: several queue pairs, and a patched QEMU."""
    ends = {"rdma": (False, False), "helpers": (True, True), "to-qemu": (True, False), "of-qemu": (False, True)}
    return [
        Contender(name + ("-pin" if pin else ""), "rdma", source=source, destination=destination, pin_all=pin)
        for name, (source, destination) in ends.items()
        for pin in (False, True)
    ] + [helpers(2), *([helpers(1, "patched", patched=True)] if PATCHED.exists() else [])]


def boot(words, out):
    """Runs scripts/bench inside the lab; what comes out as its result goes to the file `out`."""
    words = ["scripts/bench", "--inside", "lab", "--no-warm", *words, "--out", "-"]
    environment = {"LAB_TIMEOUT": "3600", **os.environ}
    line = [ROOT / "scripts/lab/run", shlex.join(words)]
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) as lab:
        for text in lab.stdout:
            if not text.startswith(documents.RESULT):
                print(text, end="", flush=True)
            elif out:
                documents.save(out, json.loads(text.removeprefix(documents.RESULT)))
    return lab.returncode


def baselines(settings):
    """MiB a second of the device, and of QEMU's stream that is read and dropped."""
    speeds = [stream_speed(settings) for _ in range(settings.runs or 3)]
    found = {"ib_write_bw": ib_write_bw(), "stream": statistics.median(speeds)}
    print(f"ib_write_bw, messages of 1 MiB: {found['ib_write_bw']:.1f} MiB/s")
    print(f"QEMU's stream, read and dropped: {found['stream']:.1f} MiB/s in the first pass", flush=True)
    return found


def stream_speed(settings):
    """How fast QEMU itself puts RAM into its stream, for somebody who takes all and does nothing.

    A helper learns from the stream what to write, and is no faster.
    """
    with Pair(settings, LAB.scaled(settings.scale), Contender("stream")) as pair:
        path = pair.directory / "stream"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=drop, args=(listener,), daemon=True).start()
        qemu = pair.source.own
        qemu.run("migrate", uri=f"unix:{path}")
        active = qemu.await_event("MIGRATION", status="active")
        end = qemu.await_event("MIGRATION_PASS", **{"pass": 2})
        return qemu.run("query-migrate")["ram"]["transferred"] / (1 << 20) / (end - active)


def drop(listener):
    stream, _ = listener.accept()
    buffer = bytearray(256 << 10)
    while stream.recv_into(buffer):
        pass


def ib_write_bw():
    """The device's own speed, MiB/s, for messages as large as a write of the helpers'."""
    tree = ROOT / ".cache/lab/tree/usr"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tree / "lib/x86_64-linux-gnu")}
    line = [tree / "bin/ib_write_bw", "-R", "-F", "-d", "rxe0", "-s", str(1 << 20), "-n", "100"]
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    server = subprocess.Popen(line, **options)
    time.sleep(2)
    client = subprocess.run([*line, ADDRESS], **options)
    server.communicate()
    rows = [words for words in map(str.split, client.stdout.splitlines()) if words[:1] == [str(1 << 20)]]
    if not rows:
        sys.exit(f"bench: ib_write_bw failed: {client.stdout}")
    return float(rows[0][3])
