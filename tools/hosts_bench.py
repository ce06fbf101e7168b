"""Measure UCX over TCP between two network namespaces whose cable carries so many Gbit/s, and print a table.

sudo .venv/bin/python tools/hosts_bench.py                       # 10 Gbit/s: 64K to 256M, writes and reads
sudo .venv/bin/python tools/hosts_bench.py --sizes 1M --ops read --ucx TCP_TX_SEG_SIZE=128K

It needs root and iproute2. The namespaces exist in a mount namespace of this program only, and so end with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

NEAR, FAR = "near", "far"
_INSIDE = "--inside"
_MOUNT = 'mkdir -p /run/netns && mount -t tmpfs none /run/netns && exec "$@"'
Row = dict[str, Any]


def main() -> None:
    """Enter a mount namespace, make the hosts there, measure, and print."""
    if _INSIDE not in sys.argv:
        again = [sys.executable, __file__, _INSIDE, *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--mount", "sh", "-c", _MOUNT, "sh", *again])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(_INSIDE, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gbit", type=float, default=10.0, help="what the cable carries in each direction")
    parser.add_argument("--sizes", default="64K,1M,16M,256M")
    parser.add_argument("--ops", default="write,read")
    parser.add_argument("--rounds", default="5")
    parser.add_argument("--memory", default="huge")
    parser.add_argument("--ucx", action="append", default=[], help="options of UCX beside TLS=tcp")
    parser.add_argument("--baselines", default="socket,ucx_perftest,nixl")
    parser.add_argument("rest", nargs="*", help="more options of `raynixl bench transfer`, after --")
    given = parser.parse_args()
    lay_cable(given.gbit)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors; the cable carries {given.gbit:g} Gbit/s\n")
    for op in given.ops.split(","):
        command = bench_command(op, given)
        print(f"`{shlex.join(['raynixl', *command[4:]])}`\n")
        print_table(op, rows_of(command), given.gbit)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


def lay_cable(gbit: float) -> None:
    """Make two hosts and join them; what either sends is held back by a token bucket."""
    burst = max(256 << 10, int(gbit * 1e9 / 8 * 0.001))  # 1 ms, and several of the kernel's largest segments
    lines = [
        f"netns add {NEAR}",
        f"netns add {FAR}",
        f"link add eth0 netns {NEAR} type veth peer name eth0 netns {FAR}",
    ]
    _run("ip", "-batch", "-", lines=lines)
    for number, name in enumerate((NEAR, FAR), 1):
        up = [f"addr add 10.77.0.{number}/24 dev eth0", "link set eth0 addrgenmode none", "link set eth0 up"]
        _run("ip", "-n", name, "-batch", "-", lines=[*up, "link set lo up"])
        _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", f"{int(gbit * 1e6)}kbit",
             "burst", str(burst), "latency", "20ms")  # fmt: skip


def bench_command(op: str, given: argparse.Namespace) -> list[str]:
    """Return the `raynixl bench transfer` that measures from one host to the other."""
    options = ["--backend", "ucx", "--op", op, "--sizes", given.sizes, "--memory", given.memory]
    options += ["--rounds", given.rounds, "--launch", f"ip netns exec {FAR}", "--json"]
    for one in ("TLS=tcp", *given.ucx):
        options += ["--ucx", one]
    for name in filter(None, given.baselines.split(",")):
        options += ["--baseline", name]
    return [sys.executable, "-P", "-m", "raynixl", "bench", "transfer", *options, *given.rest]


def rows_of(command: Sequence[str]) -> Iterator[Row]:
    """Run it on the near host; yield its rows as they come."""
    with subprocess.Popen(["ip", "netns", "exec", NEAR, *command], stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        yield from map(json.loads, bench.stdout)
    if bench.returncode != 0:
        sys.exit(bench.returncode)


def print_table(op: str, rows: Iterator[Row], gbit: float) -> None:
    """Print what each implementation makes of the cable."""
    print(f"| {op} of | | p50 us | Gbit/s | of the cable | of a plain socket |\n|---|---|---|---|---|---|")
    for nbytes, group in itertools.groupby(rows, lambda row: row["block_nbytes"]):
        together = list(group)
        plain = next((row["gbps"] for row in together if row["impl"] == "socket"), None)
        for row in together:
            share = f"{row['gbps'] / plain:.0%}" if plain else ""
            cells = (f"{nbytes >> 10:,} KiB", row["impl"], f"{row['p50_us']:,.0f}", f"{8 * row['gbps']:.2f}")
            print("| " + " | ".join((*cells, f"{8 * row['gbps'] / gbit:.0%}", share)) + " |", flush=True)
    print()


def _run(*command: str, lines: Sequence[str] = ()) -> None:
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")


if __name__ == "__main__":
    main()
