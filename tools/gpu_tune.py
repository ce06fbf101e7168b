"""Times the kernels of the nvlink backend in variants on the GPU that is here: what Tuning and the compiler are given.

    python tools/gpu_tune.py --out tune.json [--quick] [--only single,arithmetic]

Figures are GB/s of bytes moved (each is read and written once), medians; `memcpy` is cuMemcpyDtoDAsync of as much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raynixl import cuda
from raynixl.backends.nvlink_digest import digest_rows
from raynixl.backends.nvlink_mover import Mover, mover
from raynixl.backends.nvlink_quantise import quantise_blocks
from raynixl.backends.nvlink_tiles import Tuning

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
POOL = 4 * GIB
NO_ENGINE = Tuning(small_nbytes=0, engine_rows=0)
LISTS = {"100000x4K": (100_000, 4 * KIB), "10000x64K": (10_000, 64 * KIB), "1000x1M": (1000, MIB)}
LISTS |= {"1000000x256": (1_000_000, 256), "100000x4K+1": (100_000, 4 * KIB), "10000x64K+4": (10_000, 64 * KIB)}


class Bench:
    """Two pools of memory, a stream and two events."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.source, self.target = cuda.arena(POOL, 0), cuda.arena(POOL, 0)
        with cuda.on(0):
            self.stream = cuda.stream_create()
            self.begin, self.end = cuda.event_create(is_timed=True), cuda.event_create(is_timed=True)
            for value, one in ((0x5A, self.source), (0xA5, self.target)):
                cuda.memset_async(one.address, value, POOL, self.stream)
            cuda.stream_synchronize(self.stream)

    def seconds(self, run: Callable[[], None], repeats: int = 4) -> float:
        """Median seconds on the GPU of what `run` puts on the stream."""
        found = []
        with cuda.on(0):
            run()
            for _ in range(self.rounds):
                cuda.event_record(self.begin, self.stream)
                for _ in range(repeats):
                    run()
                cuda.event_record(self.end, self.stream)
                cuda.stream_synchronize(self.stream)
                found.append(cuda.event_elapsed_ms(self.begin, self.end) / 1e3 / repeats)
        return statistics.median(found)

    def memcpy(self, nbytes: int) -> float:
        """Seconds of one copy by CUDA."""
        one = self.target.address, self.source.address, nbytes, self.stream
        return self.seconds(lambda: cuda.memcpy_async(*one), 4 if nbytes > MIB else 50)

    def rows(self, blocks: int, nbytes: int, skew: int) -> Any:
        """Rows of random slots on both sides."""
        slot = nbytes + (16 if skew else 0)
        slots = min(POOL // slot - 1, max(blocks, 1))
        rng = np.random.default_rng(blocks)
        source, target = (rng.permutation(slots)[:blocks].astype(np.uint64) * np.uint64(slot) for _ in range(2))
        size = np.full(len(source), nbytes, np.uint64)
        return np.stack(
            [source + np.uint64(self.source.address + skew), target + np.uint64(self.target.address), size], 1
        )

    def program(self, gpu: Mover, rows: Any) -> float:
        """Seconds of a list on the GPU."""
        program = gpu.program(rows, [])
        lane, _ = gpu.capture(program, self.stream)
        found = self.seconds(lambda: program.start.put(lane, 0))
        gpu.release(lane)
        return found


@contextmanager
def variant(tuning: Tuning, options: tuple[str, ...]) -> Iterator[Mover]:
    """A mover of its own."""
    made = Mover(0, tuning, options)
    yield made
    made.close()


def tune_lists(bench: Bench, quick: bool) -> list[dict[str, Any]]:
    """Every list with every variant of the kernels and every length of a tile."""
    found = []
    rows = {name: bench.rows(*size, skew=int(name.partition("+")[2] or 0)) for name, size in LISTS.items()}
    for name, size in LISTS.items():
        total = len(rows[name]) * size[1]
        found.append({"list": name, "variant": "memcpy", "gbps": total / bench.memcpy(total) / 1e9})
    builds = [(8, 3, False), (8, 3, True), (4, 4, False)]
    if not quick:
        builds += [(4, 4, True), (8, 2, False), (4, 5, False), (16, 2, False)]
    for unroll, ctas, streams in builds:
        options = (f"-DUNROLL={unroll}", f"-DCTAS={ctas}", *(["-DHINT_STREAM"] if streams else []))
        for tile in (4 * KIB, 16 * KIB, 64 * KIB):
            tuning = replace(NO_ENGINE, ctas=ctas, least_tile_nbytes=tile, most_tile_nbytes=tile)
            with variant(tuning, options) as gpu:
                for name, size in LISTS.items():
                    if tile > 4 * KIB and size[1] <= 4 * KIB:
                        continue
                    seconds = bench.program(gpu, rows[name])
                    label = f"unroll {unroll} ctas {ctas}{' stream' if streams else ''} tile {tile // KIB}K"
                    found.append({"list": name, "variant": label, "gbps": len(rows[name]) * size[1] / seconds / 1e9})
    return found


def tune_narrow(bench: Bench) -> list[dict[str, Any]]:
    """Short blocks by a warp each and by 8 threads each."""
    found = []
    for nbytes in (64, 128, 256, 512, 1024, 2048):
        rows = bench.rows(300_000, nbytes, 0)
        for name, narrow in (("a warp", 0), ("8 threads", 1 << 30)):
            with variant(replace(NO_ENGINE, narrow_nbytes=narrow), ()) as gpu:
                gbps = 300_000 * nbytes / bench.program(gpu, rows) / 1e9
            found.append({"list": f"300000x{nbytes}", "variant": name, "gbps": gbps})
    return found


def tune_single(bench: Bench) -> list[dict[str, Any]]:
    """One block by each way: microseconds on the GPU, and from post to done."""
    found = []
    ways = {"small": Tuning(small_nbytes=GIB), "range": NO_ENGINE}
    ways["engine"] = Tuning(small_nbytes=0, engine_nbytes=0)
    for name, tuning in ways.items():
        with variant(tuning, ()) as gpu:
            for nbytes in (8, 512, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, GIB):
                if name == "small" and nbytes > MIB:
                    continue
                row = np.array([[bench.source.address, bench.target.address, nbytes]], np.uint64)
                on_gpu = bench.program(gpu, row)
                program, posts = gpu.program(row, []), []
                for _ in range(200 if nbytes <= MIB else 20):
                    began = time.perf_counter()
                    result = program.run(10.0)
                    if not isinstance(result, int):
                        result.wait(10.0)
                    posts.append(time.perf_counter() - began)
                line = {
                    "way": name,
                    "nbytes": nbytes,
                    "gpu_us": on_gpu * 1e6,
                    "post_us": statistics.median(posts) * 1e6,
                }
                found.append(line | {"gbps": nbytes / on_gpu / 1e9})
    return found


def time_arithmetic(bench: Bench) -> list[dict[str, Any]]:
    """Digests and FP8 of a GiB: GB/s read."""
    out, found = np.zeros((256, 2), np.uint64), []
    for skew in (0, 4, 1):
        size = 4 * MIB
        starts = np.arange(256, dtype=np.uint64) * np.uint64(size)
        rows = np.stack(
            [starts + np.uint64(bench.source.address + skew), np.full(256, size, np.uint64), starts, starts], 1
        )
        rows[:, 3] = np.arange(256)
        posts = []
        for _ in range(bench.rounds):
            began = time.perf_counter()
            digest_rows(0, rows, out, seed=1)
            posts.append(time.perf_counter() - began)
        found.append({"what": f"digest +{skew}", "gbps": GIB / statistics.median(posts) / 1e9})
    one = {"source": bench.source.address, "stored": bench.target.address, "scales": bench.target.address + 3 * GIB}
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        shape = (1, 8192, GIB // 8192 // width)
        seconds = bench.seconds(partial(quantise_blocks, 0, **one, shape=shape, dtype=dtype, stream=bench.stream))
        found.append({"what": f"fp8 of {dtype}", "gbps": GIB / seconds / 1e9})
    return found


def show(title: str, lines: list[dict[str, Any]]) -> None:
    """Print lines as a table."""
    print(f"\n{title}")
    for line in lines:
        print(
            "  "
            + "  ".join(f"{key} {value:.1f}" if isinstance(value, float) else f"{value}" for key, value in line.items())
        )


def main() -> None:
    """Run everything, write it down, print it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--only", default="single,lists,narrow,arithmetic")
    given = options.parse_args()
    bench = Bench(3 if given.quick else 5)
    mover(0)
    parts = {
        "single": partial(tune_single, bench),
        "lists": partial(tune_lists, bench, given.quick),
        "narrow": partial(tune_narrow, bench),
        "arithmetic": partial(time_arithmetic, bench),
    }
    found = {name: part() for name, part in parts.items() if name in given.only.split(",")}
    if given.out is not None:
        given.out.write_text(json.dumps(found))
    for title, lines in found.items():
        show(title, lines)


if __name__ == "__main__":
    main()
