"""machine - where and with what the figures were made."""
import os, pathlib, platform, re, subprocess, time

from .contenders import HELPER, PATCHED, ROOT


def describe(settings):
    processors = re.findall(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"MemTotal: *(\d+)", pathlib.Path("/proc/meminfo").read_text())
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": processors[0] if processors else platform.machine(),
        "processors": os.cpu_count(),
        "memory": int(memory[1]) // 1024,
        "kernel": platform.release(),
        "system": system(),
        "qemu": output(ROOT / f".cache/bin/qemu-{settings.qemu}", "--version").splitlines()[0],
        **({"patched": output(PATCHED, "--version").splitlines()[0]} if PATCHED.exists() else {}),
        "helper": output(HELPER, "--version").strip(),
        "commit": output("git", "describe", "--always", "--dirty").strip(),
        "load": os.getloadavg()[0],
    }


def system():
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', pathlib.Path("/etc/os-release").read_text(), re.MULTILINE)
    return found[1] if found else platform.system()


def output(*line):
    try:
        return subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout or "unknown"
    except OSError:  # git need not be installed
        return "unknown"
