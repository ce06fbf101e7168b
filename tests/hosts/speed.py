"""How much of a capped link one-sided transfers use: run as a script, it makes two hosts and prints a table.

    python tests/hosts/speed.py --gbit 10 --rails 1

The share is of what plain TCP carries over the same link in the same minute, and of the cap itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from agent_tools import make_config
from hosts_tools import Bed, Host, environment

from raynixl import Agent

PATIENCE = 60.0
MIB = 1 << 20
SIZES = (MIB, 4 * MIB, 16 * MIB, 64 * MIB)
SECONDS = 1.0
TCP = """
    import socket, sys, time
    if sys.argv[1] == "take":
        with socket.create_server((sys.argv[2], 5001)) as server:
            print("listening", flush=True)
            connection, _ = server.accept()
            buffer, taken = bytearray(1 << 20), 0
            began = time.perf_counter()
            while part := connection.recv_into(buffer):
                taken += part
            print(8 * taken / (time.perf_counter() - began) / 1e9)
    else:
        with socket.create_connection((sys.argv[2], 5001)) as connection:
            for _ in range(1000):
                connection.sendall(bytes(1 << 20))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gbit", type=float, default=10.0, help="the cap of every cable")
    parser.add_argument("--rails", type=int, default=1, choices=(1, 2))
    parser.add_argument("--ucx", default="TLS=tcp", help="options of UCX, as in RAYNIXL_UCX")
    given = parser.parse_args()
    with Bed() as bed:
        if given.rails == 2:
            bed.second_rail()
        for host in bed:
            for rail in range(bed.rails):
                bed.cap(host, given.gbit, rail=rail)
        first, second = bed
        tcp = plain_tcp(first, second)
        print(f"plain TCP: {tcp:.2f} Gbit/s on one of {bed.rails} rails, capped at {given.gbit:g}")
        for row in rows(first, second, given.ucx):
            gbit = row["gbit"]
            print(
                f"{row['op']:5} {row['blocks']:5} x {row['nbytes'] >> 10:6} KiB  {gbit:6.2f} Gbit/s"
                f"  {gbit / given.gbit / bed.rails:5.1%} of the cap  {gbit / tcp / bed.rails:6.1%} of plain TCP"
            )


def plain_tcp(first: Host, second: Host) -> float:
    """The Gbit/s of one TCP connection."""
    taking = second.python(TCP, "take", second.address, stdout=subprocess.PIPE)
    assert taking.stdout is not None
    assert taking.stdout.readline() == "listening\n"
    first.ask(TCP, "give", second.address, timeout=PATIENCE)
    return float(taking.communicate(timeout=PATIENCE)[0])


def rows(first: Host, second: Host, ucx: str) -> Iterator[dict[str, Any]]:
    """Start an agent on either host; yield what the first one measures."""
    surroundings = environment(RAYNIXL_UCX=ucx, RAYNIXL_BACKENDS="ucx", RAYNIXL_SECRET="of the hosts")
    options: dict[str, Any] = {"env": surroundings, "text": True, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    far = second.run([sys.executable, __file__, "serve"], **options)
    assert far.stdin is not None
    assert far.stdout is not None
    near = first.run([sys.executable, __file__, "measure", far.stdout.readline().strip()], **options)
    assert near.stdin is not None
    assert near.stdout is not None
    with near.stdin, near.stdout:
        yield from map(json.loads, near.stdout)
    far.communicate(timeout=PATIENCE)


def serve() -> None:
    """Hold the memory until the standard input closes."""
    with Agent("far", config=make_config()) as agent:
        agent.empty(SIZES[-1], name="far").array()[:] = 1
        print(agent.record().decode(), flush=True)
        sys.stdin.read()


def measure(record: str) -> None:
    """Read and write, one operation at a time; print the medians."""
    with Agent("near", config=make_config()) as agent:
        peer, mine = agent.peer(record.encode()), agent.empty(SIZES[-1])
        mine.array()[:] = 2
        for op in ("write", "read"):
            for nbytes in SIZES:
                theirs, ours = peer["far"].span(0, nbytes), mine.span(0, nbytes)
                plan = agent.prepare(op, *((ours, theirs) if op == "write" else (theirs, ours)))
                seconds = statistics.median(timed(plan))
                row = {"op": op, "nbytes": nbytes, "blocks": 1, "gbit": 8 * nbytes / seconds / 1e9}
                print(json.dumps(row), flush=True)


def timed(plan: Any) -> Iterator[float]:
    """The seconds of each of many posts."""
    plan.post().wait(PATIENCE)
    until = time.perf_counter() + SECONDS
    while (began := time.perf_counter()) < until:
        plan.post().wait(PATIENCE)
        yield time.perf_counter() - began


if __name__ == "__main__":
    commands = {"serve": serve, "measure": measure}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        commands[sys.argv[1]](*sys.argv[2:])
    else:
        main()
