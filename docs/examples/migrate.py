#!/usr/bin/env python3
"""Migrate a guest through two helpers with QEMU's own QMP library (pip install qemu.qmp).

Nothing in here is special to the helpers but the address, rdma:HOST:PORT, and the event
RDMA_MIGRATION_THROUGHPUT. The sockets are those that 'qemu-rdma-helper attach --qmp' serves; the
one of the other host can be had with 'ssh -nNT -L ./destination.qmp:/run/guest.qmp destination'.
"""

import argparse
import asyncio
import contextlib
import sys

from qemu.qmp import EventListener, QMPClient, QMPError

EVENTS = ("MIGRATION", "RDMA_MIGRATION_THROUGHPUT")
ENDS = ("completed", "failed", "cancelled")


async def prepare(client: QMPClient, pin_all: bool) -> None:
    """Ask for MIGRATION events, and for all RAM to be registered at the start or not."""
    wanted = {"events": True, "rdma-pin-all": pin_all}
    capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
    await client.execute("migrate-set-capabilities", {"capabilities": capabilities})


async def end_of(events: EventListener) -> str:
    """Print what happens until the migration is over; how it ended."""
    async for event in events:
        data = event["data"]
        if event["event"] == "MIGRATION":
            print(f"migration: {data['status']}", flush=True)
            if data["status"] in ENDS:
                return data["status"]
        else:
            left = data["remaining"] >> 20
            print(f"{data['fabric']}: {data['mbps']:.0f} mbps, {left} MiB left", flush=True)
    raise AssertionError("a listener has no end")


async def migrate(source: QMPClient, destination: QMPClient, args: argparse.Namespace) -> bool:
    """Run one migration; is the guest at the destination?"""
    for client in (destination, source):
        await prepare(client, args.pin_all)
    if args.max_bandwidth:
        limit = {"max-bandwidth": args.max_bandwidth}
        await source.execute("migrate-set-parameters", limit)
    # The reply comes when the destination listens: then the source may connect.
    await destination.execute("migrate-incoming", {"uri": args.uri})
    with source.listener(EVENTS) as events:
        await source.execute("migrate", {"uri": args.uri})
        try:
            end = await end_of(events)
        except asyncio.CancelledError:  # Ctrl-C
            await source.execute("migrate_cancel")
            end = await end_of(events)
    state = await source.execute("query-migrate")
    if end == "completed":
        ram = state["ram"]
        print(f"sent {ram['transferred'] >> 20} of {ram['total'] >> 20} MiB, ", end="")
        print(f"{state['total-time']} ms, downtime {state['downtime']} ms")
        return True
    # Why it failed, and what became of the guest where it does not run on at the source.
    why = state.get("error-desc", "the guest runs on at the source")
    print(f"{end}: {why}", file=sys.stderr)
    return False


async def main(args: argparse.Namespace) -> bool:
    """Connect to both helpers, and migrate."""
    source, destination = QMPClient("source"), QMPClient("destination")
    try:
        await source.connect(args.source)
        await destination.connect(args.destination)
        return await migrate(source, destination, args)
    finally:
        for client in (source, destination):
            # A QEMU that has received part of a guest ends, and hangs up.
            with contextlib.suppress(EOFError, OSError):
                await client.disconnect()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="SOURCE.qmp", help="the source helper's QMP socket")
    parser.add_argument("destination", metavar="DESTINATION.qmp", help="the destination's")
    parser.add_argument("uri", metavar="rdma:HOST:PORT", help="where the destination listens")
    parser.add_argument("--pin-all", action="store_true", help="register all RAM at the start")
    parser.add_argument("--max-bandwidth", type=int, metavar="BYTES", help="per second")
    try:
        sys.exit(0 if asyncio.run(main(parser.parse_args())) else 1)
    except QMPError as error:
        sys.exit(f"migrate.py: {error}")
