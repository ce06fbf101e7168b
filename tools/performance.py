"""Measure what docs/performance.md says, and print its tables: one section for each command, in Markdown.

.venv/bin/python tools/performance.py ucx peers          # only the sections with one of these words in their titles
.venv/bin/python tools/performance.py > tables.md        # about 12 minutes, on an idle machine
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]


def bench(command: str) -> list[Row]:
    """Run one `raynixl bench` command and return its rows."""
    print(f"measuring: {command}", file=sys.stderr, flush=True)
    arguments = [sys.executable, "-P", "-m", "raynixl", "bench", *command.split(), "--json"]
    ended = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, timeout=600, check=True)
    return [json.loads(line) for line in ended.stdout.splitlines()]


def size(nbytes: int) -> str:
    """Return a size as people write it."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a Markdown table."""
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def versus(rows: list[Row], key: Callable[[Row], object]) -> Iterator[tuple[Row, Row]]:
    """Pair our rows with those of the baseline."""
    others = {key(row): row for row in rows if row["impl"] != "raynixl"}
    return ((row, others[key(row)]) for row in rows if row["impl"] == "raynixl")


def speed(command: str, baseline: str) -> Iterator[str]:
    """GB/s of one block against a baseline."""
    rows = bench(f"transfer {command} --baseline {baseline}")
    cells = [
        (
            size(ours["block_nbytes"]),
            f"{ours['gbps']:.1f}",
            f"{other['gbps']:.1f}",
            f"{ours['gbps'] / other['gbps']:.2f}",
        )
        for ours, other in versus(rows, lambda row: row["block_nbytes"])
    ]
    yield f"`raynixl bench transfer {command} --baseline {baseline}`\n"
    yield from table(("one block", "raynixl GB/s", f"{baseline} GB/s", "ratio"), cells)


def many(command: str) -> Iterator[str]:
    """Many blocks in one transfer: microseconds a block, and GB/s against memcpy."""
    rows = bench(f"transfer {command} --baseline memcpy")
    cells = [
        (
            size(ours["block_nbytes"]),
            f"{ours['prepare_us_per_block'] + ours['post_us_per_block']:.2f}",
            f"{ours['gbps']:.1f}", f"{other['gbps']:.1f}", f"{ours['gbps'] / other['gbps']:.2f}",
        )
        for ours, other in versus(rows, lambda row: row["block_nbytes"])
    ]  # fmt: skip
    yield f"`raynixl bench transfer {command} --baseline memcpy`\n"
    yield from table(("blocks of", "prepare + post, us a block", "raynixl GB/s", "memcpy GB/s", "ratio"), cells)


def latency() -> Iterator[str]:
    """Microseconds of small prepared writes."""
    arena = bench("transfer --sizes 8,64,512,4K --threads 1 --rounds 9")
    user = bench("transfer --sizes 8,64,512,4K --threads 1 --rounds 9 --memory user --baseline process_vm")
    cells = [
        (
            size(ours["block_nbytes"]), f"{ours['p50_us']:.2f}", f"{ours['p99_us']:.2f}",
            f"{theirs['p50_us']:.2f}", f"{theirs['p99_us']:.2f}", f"{bare['p50_us']:.2f}",
        )
        for ours, (theirs, bare) in zip(arena, versus(user, lambda row: row["block_nbytes"]), strict=True)
    ]  # fmt: skip
    yield "`raynixl bench transfer --sizes 8,64,512,4K --threads 1 --rounds 9`; `--memory user --baseline process_vm`\n"
    heads = ("one prepared write of", "arena p50 us", "p99", "user memory p50 us", "p99", "bare process_vm p50 us")
    yield from table(heads, cells)


def on_lane(command: str) -> Iterator[str]:
    """UCX on one lane, one block: GB/s beside ucx_perftest and NIXL, both directions."""
    options = f"--backend ucx {command} --baseline ucx_perftest --baseline nixl"
    yield f"`raynixl bench transfer {options} --op write`, then `--op read`\n"
    cells = []
    for op in ("write", "read"):
        for ours, perftest, nixl in by_size(bench(f"transfer {options} --op {op}")):
            cells.append((
                op, size(ours["block_nbytes"]), f"{ours['p50_us']:,.1f}",
                *(f"{row['gbps']:.2f}" for row in (ours, perftest, nixl)),
                f"{ours['gbps'] / perftest['gbps']:.2f}", f"{ours['gbps'] / nixl['gbps']:.2f}",
            ))  # fmt: skip
    heads = ("", "one block", "raynixl p50 us", "raynixl GB/s", "ucx_perftest GB/s", "NIXL GB/s")
    yield from table((*heads, "of ucx_perftest", "of NIXL"), cells)


def many_on_lanes() -> Iterator[str]:
    """UCX, 10,000 random blocks: microseconds a block beside ucx_perftest's stream and NIXL."""
    command = "--backend ucx --memory huge --sizes 4K --blocks 10000 --pattern random --threads 1"
    options = f"{command} --baseline ucx_perftest --baseline nixl"
    yield f"`raynixl bench transfer {options} --ucx TLS=...`\n"
    cells = []
    for lane in ("cma,tcp", "tcp"):
        for op in ("write", "read"):
            ((ours, perftest, nixl),) = by_size(bench(f"transfer {options} --op {op} --ucx TLS={lane}"))
            cells.append((
                f"{op}, {lane}", f"{ours['prepare_us_per_block'] + ours['post_us_per_block']:.2f}",
                *(f"{row['post_us_per_block']:.2f}" for row in (ours, perftest, nixl)),
                f"{nixl['post_us_per_block'] / ours['post_us_per_block']:.2f}",
            ))  # fmt: skip
    heads = ("10,000 x 4 KiB, us a block", "raynixl with prepare", "raynixl", "ucx_perftest, a stream", "NIXL")
    yield from table((*heads, "faster than NIXL"), cells)


def by_size(rows: list[Row]) -> Iterator[list[Row]]:
    """Yield the rows of each size together: ours, then the baselines."""
    for nbytes in dict.fromkeys(row["block_nbytes"] for row in rows):
        yield [row for row in rows if row["block_nbytes"] == nbytes]


def small_on_lane() -> Iterator[str]:
    """UCX, small prepared writes."""
    options = "--backend ucx --sizes 8,64,512,4K --threads 1 --rounds 9 --ucx TLS=cma,tcp --baseline nixl"
    yield f"`raynixl bench transfer {options}`\n"
    cells = [
        (size(ours["block_nbytes"]), f"{ours['p50_us']:.2f}", f"{ours['p99_us']:.2f}", f"{nixl['p50_us']:.2f}")
        for ours, nixl in by_size(bench(f"transfer {options}"))
    ]
    yield from table(("one prepared write of", "raynixl p50 us", "p99", "NIXL p50 us"), cells)


def busy() -> Iterator[str]:
    """UCX beside a busy interpreter."""
    options = "--backend ucx --sizes 4K --blocks 5000 --pattern random --busy --baseline nixl"
    yield f"`raynixl bench transfer {options} --op read --ucx TLS=...`\n"
    cells = []
    for lane in ("cma,tcp", "tcp"):
        rows = bench(f"transfer {options} --op read --ucx TLS={lane}")
        for idle, loaded in zip(rows[::2], rows[1::2], strict=True):
            times = f"{idle['p50_us'] / 1e3:.1f}", f"{loaded['p50_us'] / 1e3:.1f}"
            cells.append((f"{idle['impl']}, {lane}", *times, f"{loaded['p50_us'] / idle['p50_us']:.1f}"))
    yield from table(("5,000 x 4 KiB", "idle p50 ms", "busy p50 ms", "ratio"), cells)


def peers() -> Iterator[str]:
    """What 64 peers cost one process."""
    yield "`raynixl bench peers --peers 64 --backend shm|ucx`\n"
    rows = [bench(f"peers --peers 64 --backend {backend}")[0] for backend in ("shm", "ucx")]
    cells = [
        (
            row["backend"], f"{row['seconds']:.2f} s", f"{row['p50_ms']:.1f} ms", f"{row['max_ms']:.0f} ms",
            f"{row['first_mib']:.0f} MiB", f"{row['mib_per_peer']:.2f} MiB",
            f"{row['descriptors'] / row['peers']:.1f}", str(row["threads"]),
        )
        for row in rows
    ]  # fmt: skip
    heads = ("backend", "all connected and read", "each", "slowest", "first peer", "each later", "descriptors each")
    yield from table((*heads, "threads, all"), cells)


def notify() -> Iterator[str]:
    """Round trips of a notification."""
    rows = bench("notify --baseline socket")
    yield "`raynixl bench notify --baseline socket`\n"
    cells = [(row["impl"], f"{row['pause_ms']:g} ms", f"{row['p50_us']:.0f}", f"{row['p99_us']:.0f}") for row in rows]
    yield from table(("round trip of 8 B", "pause before each", "p50 us", "p99 us"), cells)


def broadcast() -> Iterator[str]:
    """Broadcasts against the object store."""
    cells = []
    for receivers in (1, 2, 4):
        ours, ray = bench(f"broadcast --nbytes 256M --receivers {receivers} --baseline ray --rounds 7")
        ratio = f"{ours['gbps'] / ray['gbps']:.2f}"
        cells.append((str(receivers), f"{ours['gbps']:.1f}", f"{ray['gbps']:.1f}", ratio))
    yield "`raynixl bench broadcast --nbytes 256M --receivers N --baseline ray`\n"
    yield from table(("receivers", "raynixl GB/s, all together", "object store, numpy and copy", "ratio"), cells)


def weights() -> Iterator[str]:
    """Pushes of a model against other ways to bring it to as many receivers."""
    names = ("ray", "gloo", "rdt")
    command = "weights --model qwen2.5-0.5b " + " ".join(f"--baseline {name}" for name in names)
    for extra in ("", " --in-place"):
        cells = []
        for receivers in (1, 2, 4):
            rows = {row["impl"]: row for row in bench(f"{command} --receivers {receivers} --rounds 7{extra}")}
            assert all(row["verified"] for row in rows.values())
            found = [rows[name]["gbps"] for name in names if name in rows]
            ours = rows["raynixl"]["gbps"]
            shown = [f"{rows[name]['gbps']:.1f}" if name in rows else "-" for name in names]
            cells.append((str(receivers), f"{ours:.1f}", *shown, f"{ours / max(found):.2f}"))
        yield f"`raynixl bench {command} --receivers 1,2,4 --rounds 7{extra}`\n"
        yield from table(("receivers", "raynixl GB/s, all together", *names, "ratio to the best of them"), cells)
    cells = []
    for extra in ("", " --in-place"):
        for receivers in (1, 2):
            line = f"weights --model qwen2.5-0.5b --baseline transfer --receivers {receivers} --rounds 7{extra}"
            ours, bare = bench(line)
            way = "published in place" if extra else "copied out"
            ratio = f"{ours['gbps'] / bare['gbps']:.2f}"
            cells.append((f"{receivers}, {way}", f"{ours['gbps']:.1f}", f"{bare['gbps']:.1f}", ratio))
    command = "weights --model qwen2.5-0.5b --baseline transfer --receivers 1,2 --rounds 7"
    yield f"`raynixl bench {command}`, then `--in-place`\n"
    yield from table(("receivers", "raynixl GB/s, all together", "bare transfer", "ratio"), cells)


def experts() -> Iterator[str]:
    """Tokens to their experts and back, beside the same over gloo and MPI; and what many ranks would send."""
    for options, names in (
        ("--tokens 8,128,1024,4096", ("gloo", "gloo-index-add", "mpi", "mpi-split")),
        ("--tokens 128 --ranks 8", ("gloo", "mpi")),
        ("--tokens 8,128 --layout slots", ()),
    ):
        command = " ".join(["moe", options, *(f"--baseline {name}" for name in names)])
        rows = bench(command)
        assert all(row["verified"] for row in rows)
        cells = [
            (
                f"{row['tokens']:,}", row["impl"], f"{row['dispatch_ms']:.2f}", f"{row['combine_ms']:.2f}",
                f"{row['both_ms']:.2f}", f"{row['p99_ms']:.2f}", f"{row['floor_ms']:.2f}",
                "-" if row["dispatch_messages"] is None else f"{row['dispatch_messages']}; {row['combine_messages']}",
            )
            for row in rows
        ]  # fmt: skip
        yield f"`raynixl bench {command}`\n"
        heads = ("tokens of each rank", "", "dispatch ms", "combine ms", "both ms", "both p99 ms", "the bare copy ms")
        yield from table((*heads, "messages of a pair"), cells)
        yield ""
    command = "moe --simulate 64,1024 --hosts 128"
    cells = [
        (
            f"{row['ranks']:,} on {row['hosts']} hosts, {row['impl']}", f"{row['peers']:,}", f"{row['messages']:,}",
            f"{row['dispatch_ms']:.1f}; {row['combine_ms']:.1f}",
        )
        for row in bench(command)
    ]  # fmt: skip
    yield f"`raynixl bench {command}`\n"
    yield from table(("ranks", "peers of each", "messages of a step", "dispatch; combine ms, predicted"), cells)


def footprint() -> Iterator[str]:
    """What an agent costs."""
    (row,) = bench("agent")
    yield "`raynixl bench agent`\n"
    cells = [
        ("making one; the first of a process", f"{row['create_ms']:.1f} ms; {row['create_first_ms']:.0f} ms"),
        (
            "first transfer to a new peer; the first of a process",
            f"{row['first_transfer_ms']:.1f} ms; {row['first_transfer_max_ms']:.1f} ms",
        ),
        ("idle, connected", f"{row['idle_cpu_percent']:.2f} % of a core"),
        (
            "memory added to a bare interpreter; where numpy is loaded",
            f"{row['rss_mib']:.0f} MiB; {row['rss_over_numpy_mib']:.0f} MiB",
        ),
        (f"finding a peer among {row['records']:,} records in the GCS", f"{row['find_ms']:.2f} ms"),
    ]
    yield from table(("an agent", ""), cells)


SECTIONS: dict[str, Callable[[], Iterator[str]]] = {
    "Arena to arena, one thread": lambda: speed("--sizes 1M,2M,4M,8M,16M,64M,256M --threads 1", "memcpy"),
    "Arena to arena, both cores": lambda: speed("--sizes 1M,4M,16M,64M,256M --threads 2", "memcpy"),
    "10,000 random blocks, one thread": lambda: many("--sizes 4K,64K --blocks 10000 --pattern random --threads 1"),
    "10,000 random blocks, both cores": lambda: many("--sizes 4K,64K --blocks 10000 --pattern random --threads 2"),
    "Small writes": latency,
    "User memory, write": lambda: speed("--memory user --sizes 1M,16M,64M,256M --threads 1", "process_vm"),
    "User memory, read": lambda: speed("--memory user --op read --sizes 1M,16M,64M,256M --threads 1", "process_vm"),
    "UCX over CMA": lambda: on_lane("--memory huge --sizes 64K,1M,16M,64M,256M,1G --ucx TLS=cma,tcp"),
    "UCX over TCP, on one host": lambda: on_lane("--memory huge --sizes 64K,1M,16M,64M,256M --ucx TLS=tcp"),
    "UCX, 10,000 random blocks": many_on_lanes,
    "UCX, small writes": small_on_lane,
    "UCX beside a busy thread": busy,
    "64 peers": peers,
    "Notifications": notify,
    "Broadcast": broadcast,
    "Weights": weights,
    "Expert parallel": experts,
    "An agent": footprint,
}


def main() -> None:
    """Print the sections whose titles contain a word that was given, or all."""
    words = sys.argv[1:]
    for title, section in SECTIONS.items():
        if words and not any(word.lower() in title.lower() for word in words):
            continue
        print(f"## {title}\n", *section(), "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
