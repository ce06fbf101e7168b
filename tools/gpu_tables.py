"""Measure what docs/performance.md says of GPU memory, and print its tables in Markdown; tools/gpu_check.sh runs this.

python tools/gpu_tables.py                 # all sections, four to five minutes on an idle GPU
python tools/gpu_tables.py large small     # only those with one of these words in their titles

A section that fails is said, and the exit code is then 1; so it is with --strict if a goal is not met.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from performance import Row, by_size, size, table

_ROOT = str(Path(__file__).parents[1])
_SECONDS = 120.0
_MPS, _MPS_SECONDS = "nvidia-cuda-mps-control", 20.0


@dataclass
class Measured:
    """What the sections share: options of all commands, where rows go, and the goals that were not met."""

    rounds: int
    backend: str
    kept: Path | None = None
    """Where every row goes as it comes, one JSON object a line."""
    missed: list[str] = field(default_factory=list)

    def transfer(self, options: str) -> tuple[str, list[Row]]:
        """Run one command; return it as people write it, and its rows.

        Raises:
            RuntimeError: it failed, or bytes were wrong.
        """
        return self.bench(f"transfer --backend {self.backend} --rounds {self.rounds} {options}")

    def bench(self, words: str) -> tuple[str, list[Row]]:
        """Run any command of `raynixl bench`, likewise."""
        print(f"measuring: {words}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "raynixl", "bench", *words.split(), "--json"]
        began = time.monotonic()
        ended = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, timeout=_SECONDS, check=False)
        rows: list[Row] = [json.loads(line) for line in ended.stdout.splitlines()]
        if self.kept is not None:
            with self.kept.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"  {len(rows)} rows in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if ended.returncode or not rows:
            raise RuntimeError(f"`raynixl bench {words}` failed with exit code {ended.returncode}")
        return f"`raynixl bench {words}`\n", rows

    def judge(self, what: str, value: float, goal: float, *, is_most: bool = False) -> str:
        """Return a figure with its goal, and remember a goal that is not met."""
        is_met = value <= goal if is_most else value >= goal
        sign, digits = ("<=", 1) if is_most else (">=", 2)
        text = f"{value:.{digits}f} ({'met' if is_met else 'MISSED'}: {sign} {goal:g})"
        if not is_met:
            self.missed.append(f"{what}: {text}")
        return text


def large(run: Measured) -> Iterator[str]:
    """One block of GPU memory against one cuMemcpyAsync between the very same memory."""
    cells = []
    for op in ("write", "read"):
        command, rows = run.transfer(f"--memory vram --op {op} --sizes 1M,16M,64M,256M,1G --baseline cudamemcpy")
        if op == "write":
            yield f"{command.strip()}, then `--op read`\n"
        for ours, plain in by_size(rows):
            ratio, what = ours["gbps"] / plain["gbps"], f"{op} {size(ours['block_nbytes'])}"
            told = run.judge(what, ratio, 0.9) if ours["block_nbytes"] >= 64 << 20 else f"{ratio:.2f}"
            cells.append((what, f"{ours['p50_us']:,.1f}", f"{ours['gbps']:,.0f}", f"{plain['gbps']:,.0f}", told))
    yield from table(("one block", "raynixl p50 us", "raynixl GB/s", "cudamemcpy GB/s", "ratio"), cells)


def small(run: Measured) -> Iterator[str]:
    """Post to done of one small block."""
    cells = []
    for op in ("write", "read"):
        command, rows = run.transfer(f"--memory vram --op {op} --sizes 8,64,512,4K,16K,64K --baseline cudamemcpy")
        if op == "write":
            yield f"{command.strip()}, then `--op read`\n"
        for ours, plain in by_size(rows):
            what = f"{op} {size(ours['block_nbytes'])}"
            cells.append((
                what, run.judge(f"post to done, {what}, us", ours["p50_us"], 12.0, is_most=True),
                f"{ours['p99_us']:.1f}", f"{plain['p50_us']:.1f}", f"{plain['p99_us']:.1f}",
            ))  # fmt: skip
    yield from table(("post to done", "raynixl p50 us", "p99", "cudamemcpy p50 us", "p99"), cells)


def scattered(run: Measured) -> Iterator[str]:
    """100,000 blocks of 4 KiB in one launch, against one copy of as many bytes."""
    cells, commands = [], []
    for op, pattern in (("write", "random"), ("read", "random"), ("write", "sequential")):
        command, rows = run.transfer(
            f"--memory vram --op {op} --sizes 4K --blocks 100000 --pattern {pattern} --baseline cudamemcpy"
        )
        commands.append(command.strip())
        ((ours, plain),) = by_size(rows)
        ratio, what = ours["gbps"] / plain["gbps"], f"{op}, {pattern}"
        told = run.judge(f"100,000 x 4 KiB, {what}", ratio, 0.7) if pattern == "random" else f"{ratio:.2f}"
        prepare = f"{ours['prepare_us_per_block'] * ours['blocks'] / 1e3:.1f}"
        cells.append((what, f"{ours['p50_us']:,.0f}", prepare, f"{ours['gbps']:,.0f}", f"{plain['gbps']:,.0f}", told))
    yield "\n".join(commands) + "\n"
    heads = ("100,000 x 4 KiB", "raynixl p50 us", "prepare ms", "raynixl GB/s", "one cudamemcpy GB/s", "ratio")
    yield from table(heads, cells)


def loops(run: Measured) -> Iterator[str]:
    """10,000 blocks against loops of copies."""
    command, rows = run.transfer(
        "--memory vram --sizes 4K,64K --blocks 10000 --pattern random"
        " --baseline cudamemcpy_loop --baseline cudamemcpy_loop_c"
    )
    yield command
    cells = []
    for ours, python, in_c in by_size(rows):
        what, is_goal = f"10,000 x {size(ours['block_nbytes'])}", ours["block_nbytes"] == 64 << 10
        over = [
            ("a loop in Python", ours["gbps"] / python["gbps"], 5.0),
            ("one in C", ours["gbps"] / in_c["gbps"], 2.0),
        ]
        told = [run.judge(f"{what} over {name}", x, goal) if is_goal else f"{x:.2f}" for name, x, goal in over]
        cells.append((
            what, *(f"{row['p50_us']:,.0f}" for row in (ours, python, in_c)), f"{ours['gbps']:,.0f}", *told,
        ))  # fmt: skip
    heads = ("random blocks", "raynixl p50 us", "loop in Python us", "loop in C us", "raynixl GB/s")
    yield from table((*heads, "faster than Python", "faster than C"), cells)


def host(run: Measured) -> Iterator[str]:
    """Between host memory and a GPU's: pinned arenas, and plain memory that is staged."""
    ways = [
        ("host to GPU, arenas", "--memory arena --target-memory vram --op write", "--baseline cudamemcpy"),
        ("GPU to host, arenas", "--memory vram --target-memory arena --op write", "--baseline cudamemcpy"),
        ("GPU to host, a read into an arena", "--memory arena --target-memory vram --op read", "--baseline cudamemcpy"),
        ("host to GPU, plain memory", "--memory user --target-memory vram --op write", "--baseline cudamemcpy"),
    ]
    cells, commands = [], []
    for name, options, baseline in ways:
        command, rows = run.transfer(f"{options} --sizes 64K,16M,256M {baseline}")
        commands.append(command.strip())
        for ours, plain in by_size(rows):
            cells.append((
                name, size(ours["block_nbytes"]), f"{ours['p50_us']:,.1f}", f"{ours['gbps']:.1f}",
                f"{plain['gbps']:.1f}", f"{ours['gbps'] / plain['gbps']:.2f}", ours["lane"],
            ))  # fmt: skip
    yield "\n".join(commands) + "\n"
    yield from table(("", "one block", "raynixl p50 us", "raynixl GB/s", "cudamemcpy GB/s", "ratio", "path"), cells)


def over_ucx(run: Measured) -> Iterator[str]:
    """The same memory over UCX on one host."""
    nvlink, run.backend = run.backend, "ucx"
    try:
        command, rows = run.transfer("--memory vram --sizes 4K,1M,64M,256M --baseline cudamemcpy")
    finally:
        run.backend = nvlink
    yield command
    cells = [
        (
            size(ours["block_nbytes"]), f"{ours['p50_us']:,.1f}", f"{ours['gbps']:.1f}", f"{plain['gbps']:,.0f}",
            ours["lane"],
        )
        for ours, plain in by_size(rows)
    ]  # fmt: skip
    yield from table(("one block", "raynixl p50 us", "raynixl GB/s", "cudamemcpy GB/s", "path"), cells)


@contextlib.contextmanager
def shared_gpu() -> Iterator[str]:
    """Have processes that begin meanwhile share GPUs by MPS; yield '', or why they do not.

    A daemon that runs already stays as it is; ours ends.
    """
    if shutil.which(_MPS) is None:
        yield f"{_MPS} is not here"
        return
    began = subprocess.run([_MPS, "-d"], capture_output=True, text=True, timeout=_MPS_SECONDS, check=False)
    if began.returncode:
        yield f"{_MPS} -d failed: {(began.stderr or began.stdout).strip()}"
        return
    try:
        yield ""
    finally:
        subprocess.run([_MPS], input="quit\n", capture_output=True, text=True, timeout=_MPS_SECONDS, check=False)


def experts(run: Measured) -> Iterator[str]:
    """Expert parallelism of four processes on one GPU, in turns and by MPS, beside one kernel that copies the rows."""
    yield from experts_once(run)
    yield ""
    with shared_gpu() as reason:
        if reason:
            yield f"Not measured with MPS: {reason}"
        else:
            yield from experts_once(run)


def experts_once(run: Measured) -> Iterator[str]:
    """All layouts once."""
    cells, commands = [], []
    for layout in ("slots", "tokens", "experts"):
        command, rows = run.bench(
            f"moe --memory vram --ranks 4 --tokens 128 --hidden 7168 --topk 8 --experts 64 --layout {layout}"
            f" --rounds {run.rounds}"
        )
        commands.append(command.strip())
        for row in rows:
            name = f"{layout}, {'graph' if row['impl'] != 'raynixl' else 'calls'}"
            ms = [f"{row[what]:.3f}" for what in ("dispatch_ms", "combine_ms", "both_ms", "p99_ms", "floor_ms")]
            cells.append((name, *ms, "yes" if row["mps"] else "no"))
    yield "\n".join(commands) + "\n"
    heads = ("4 ranks, 128 tokens, top-8 of 64", "dispatch ms", "combine ms", "both ms", "p99", "copy of the rows ms")
    yield from table((*heads, "MPS"), cells)


def pushes(run: Measured) -> Iterator[str]:
    """The weights of a whole model from one process to another on the same GPU."""
    command, rows = run.bench(f"weights --memory vram --rounds {run.rounds} --baseline transfer")
    yield command
    cells = [
        (row["impl"], f"{row['seconds'] * 1e3:,.1f}", f"{row['gbps']:,.1f}", f"{row['flip_ms']:.2f}")
        for row in rows
    ]  # fmt: skip
    yield from table(("qwen2.5-0.5b on one GPU", "ms", "GB/s", "flip ms"), cells)


Section = Callable[[Measured], Iterator[str]]
SECTIONS: dict[str, Section] = {  # what no GPU has measured yet goes first
    "Expert parallel on a GPU": experts,
    "Weights on a GPU": pushes,
    "GPU to GPU, one large block": large,
    "GPU to GPU, small blocks": small,
    "GPU to GPU, scattered blocks": scattered,
    "GPU to GPU, against loops": loops,
    "Host memory and GPU": host,
    "GPU to GPU over UCX": over_ucx,
}


def show(run: Measured, title: str, section: Section) -> bool:
    """Print a section; whether it could be measured."""
    print(f"### {title}\n")
    try:
        for line in section(run):
            print(line, flush=True)
        print(flush=True)
    except (RuntimeError, subprocess.TimeoutExpired, ValueError, KeyError) as exc:
        print(f"FAILED: {exc}\n", flush=True)
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the sections whose titles contain a word that was given, or all; return the exit code."""
    parser = argparse.ArgumentParser(description="Tables of GPU memory for docs/performance.md.")
    parser.add_argument("words", nargs="*", help="only sections with one of these words in their titles")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="nvlink")
    parser.add_argument("--rows", type=Path, help="append all rows there, one JSON object a line")
    parser.add_argument("--strict", action="store_true", help="exit with 1 also if a goal is not met")
    given = parser.parse_args(arguments)
    run, words = Measured(given.rounds, given.backend, given.rows), [word.lower() for word in given.words]
    chosen = {
        title: one for title, one in SECTIONS.items() if not words or any(word in title.lower() for word in words)
    }
    if not chosen:
        parser.error(f"no section's title has one of these words; there are: {', '.join(SECTIONS)}")
    measured = [show(run, title, section) for title, section in chosen.items()]
    for text in run.missed:
        print(f"goal missed: {text}", file=sys.stderr)
    return int(not all(measured) or (given.strict and bool(run.missed)))


if __name__ == "__main__":
    sys.exit(main())
