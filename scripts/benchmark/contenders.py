"""contenders - who carries the migration: QEMU by itself in several ways, or the helpers."""
import dataclasses, pathlib, subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
HELPER = ROOT / "target/release/qemu-rdma-helper"
PATCHED = ROOT / ".cache/bin/qemu-patched"


@dataclasses.dataclass(frozen=True)
class Contender:
    name: str
    scheme: str = "tcp"
    multifd: int = 0  # QEMU's channels; 0: without that capability
    private: bool = False  # guest memory is anonymous, as it is by default
    source: bool = False  # a helper stands beside this side's QEMU
    destination: bool = False
    connections: int = 1  # of the helpers, for RAM
    pin_all: bool = False
    patched: bool = False  # the source's QEMU is one of qemu-patches/


def helpers(connections, name="", **more):
    name = name or f"helpers-{connections}"
    return Contender(name, "rdma", source=True, destination=True, connections=connections, **more)


def here():
    """All that can be compared on this machine, without an RDMA device."""
    several = "--connections" in attach_help()
    return [
        Contender("tcp"),
        *(Contender(f"multifd-{channels}", multifd=channels) for channels in (2, 4, 8)),
        *(helpers(connections) for connections in ((1, 2, 4) if several else (1,))),
        *([helpers(1, "patched", patched=True)] if PATCHED.exists() else []),
        Contender("tcp-private", private=True),
        Contender("multifd-4-private", multifd=4, private=True),
    ]


def attach_help():
    return subprocess.run([HELPER, "attach", "--help"], stdout=subprocess.PIPE, text=True, check=True).stdout
