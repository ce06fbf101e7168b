"""The kernels' own code, run by the host: what a GPU would do, without its speed and its races (see tests/gpu)."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mover_tools import holds_in_child

from raynixl.backends import nvlink_kernel
from raynixl.backends.nvlink_digest import number_tiles
from raynixl.backends.nvlink_tiles import cut_rows
from raynixl.native import load
from raynixl.native.twin_digest import lane_keys

pytestmark = pytest.mark.pure

SOURCE = Path(nvlink_kernel.__file__).with_name("nvlink_kernels.cu")
HOST = Path(__file__).parents[1] / "kernels_on_host.cpp"
POISON = 0xA5
PAGE = mmap.PAGESIZE
Run = Callable[..., None]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels, compiled for the host."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    made = tmp_path_factory.mktemp("kernels") / "kernels.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w", f'-DKERNELS="{SOURCE}"']
    subprocess.run([compiler, *flags, str(HOST), "-o", str(made)], check=True, timeout=100)
    return ctypes.CDLL(str(made))


@pytest.fixture
def run(library: ctypes.CDLL) -> Run:
    """Run a kernel: run(name, grid, threads, values); where it `ends`, that must be told once and for all CTAs."""

    def call(name: str, grid: int, threads: int, values: list[int], *, ends: bool = True) -> None:
        flag, counter = np.zeros(1, np.uint64), np.zeros(2, np.uint32)
        end = [flag.ctypes.data, 77, counter.ctypes.data] if ends else []
        packed = np.array([*values, *end], np.uint64)
        assert library.run_kernel(f"raynixl_{name}".encode(), grid, threads, ctypes.c_void_p(packed.ctypes.data))
        if ends:
            assert (flag[0], counter[0], counter[1]) == (77, 0, 0)

    return call


def random_bytes(nbytes: int) -> Any:
    """Bytes that begin at a multiple of 128, with a margin that must stay as it is."""
    raw = np.random.default_rng(nbytes).integers(0, 256, nbytes + 128, np.uint8)
    skew = -raw.ctypes.data % 128
    return raw[skew : skew + nbytes]


def poisoned(nbytes: int) -> Any:
    made = random_bytes(nbytes)
    made[:] = POISON
    return made


def expected(data: Any, rows: Any, nbytes: int) -> Any:
    wanted = np.full(nbytes, POISON, np.uint8)
    for source, target, size in rows.tolist():
        wanted[target : target + size] = data[source : source + size]
    return wanted


@pytest.mark.parametrize("kernel", ["copy_tiles", "copy_narrow"])
def test_rows_of_every_alignment_and_length_are_copied(run: Run, kernel: str) -> None:
    lengths = [*range(1, 100, 3), 127, 128, 129, 200, 511, 600]
    source, target, nbytes = np.meshgrid(np.arange(16), np.arange(16), lengths, indexing="ij")
    slots = np.arange(source.size).reshape(source.shape) * 704 + 32
    rows = np.stack([(slots + source).reshape(-1), (slots + target).reshape(-1), nbytes.reshape(-1)], axis=1)
    data, found = random_bytes(source.size * 704), poisoned(source.size * 704)
    table = rows.astype(np.uint64) + np.array([data.ctypes.data, found.ctypes.data, 0], np.uint64)
    run(kernel, 3, 64, [table.ctypes.data, len(table)])
    assert (found == expected(data, rows, len(found))).all()


@pytest.mark.parametrize("grid", [1, 2])
@pytest.mark.parametrize("nbytes", [1, 100, 4096, 70_001])
@pytest.mark.parametrize("skew", [(0, 0), (1, 1), (7, 0), (0, 7), (4, 12), (15, 2)])
def test_one_span_is_copied_whole_and_in_tiles(run: Run, grid: int, nbytes: int, skew: tuple[int, int]) -> None:
    data, found = random_bytes(80_000), poisoned(80_000)
    row = np.array([[64 + skew[0], 64 + skew[1], nbytes]])
    values = [data.ctypes.data + 64 + skew[0], found.ctypes.data + 64 + skew[1], nbytes]
    if grid == 1:
        run("copy_small", 1, 128, values)
    else:
        run("copy_range", grid, 64, [*values, 4096])
    assert (found == expected(data, row, len(found))).all()


def guarded() -> tuple[mmap.mmap, int]:
    """Memory of two pages with pages on both sides that nobody may touch, and where it begins."""
    mapping = mmap.mmap(-1, 4 * PAGE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for page in (first, first + 3 * PAGE):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
    return mapping, first + PAGE


def test_nothing_outside_of_source_and_target_is_touched(library: ctypes.CDLL) -> None:
    held, at = zip(*(guarded() for _ in range(2)), strict=True)
    lengths = [1, 5, 16, 63, 64, 65, 80, 100, 127, 300, 1000]

    def touches_nothing_else() -> bool:
        flag, counter = np.zeros(1, np.uint64), np.zeros(2, np.uint32)
        for skew, nbytes, is_end in itertools.product(range(17), lengths, (True, False)):
            for source, target in ((0, skew), (skew, 0)):  # one of them at the edge
                places = [2 * PAGE - nbytes - gap if is_end else gap for gap in (source, target)]
                values = [at[0] + places[0], at[1] + places[1], nbytes, flag.ctypes.data, 7, counter.ctypes.data]
                packed = np.array(values, np.uint64)
                library.run_kernel(b"raynixl_copy_small", 1, 64, ctypes.c_void_p(packed.ctypes.data))
        return bool(flag[0] == 7)

    assert holds_in_child(touches_nothing_else), "it read or wrote beside them"
    assert all(not one.closed for one in held)


def test_tiles_of_long_rows_come_together(run: Run) -> None:
    data, found = random_bytes(200_000), poisoned(200_000)
    rows = np.array([[3, 5, 70_000], [80_000, 80_013, 40_000], [130_000, 130_016, 300]], np.uint64)
    table = cut_rows(rows + np.array([data.ctypes.data, found.ctypes.data, 0], np.uint64), 4096)
    run("copy_tiles", 4, 96, [table.ctypes.data, len(table)])
    assert (found == expected(data, rows, len(found))).all()


def test_a_kernel_without_work_ends_too(run: Run) -> None:
    run("copy_tiles", 2, 64, [0, 0])
    run("copy_range", 2, 64, [0, 0, 0, 4096])
    run("copy_small", 1, 32, [0, 0, 0])
    run("signal", 1, 32, [])


def test_ends_of_replays_are_counted(library: ctypes.CDLL) -> None:
    flag, counter = np.zeros(1, np.uint64), np.zeros(2, np.uint32)
    packed = np.array([flag.ctypes.data, 0, counter.ctypes.data], np.uint64)
    for replay in range(1, 4):
        assert library.run_kernel(b"raynixl_signal", 1, 32, ctypes.c_void_p(packed.ctypes.data))
        assert flag[0] == replay


def test_the_end_is_that_of_the_last_cta_and_of_no_other(library: ctypes.CDLL) -> None:
    flag, counter = np.zeros(1, np.uint64), np.zeros(2, np.uint32)
    packed = np.array([0, 0, flag.ctypes.data, 0, counter.ctypes.data], np.uint64)
    for replay in range(1, 4):
        assert library.run_kernel(b"raynixl_copy_tiles", 3, 64, ctypes.c_void_p(packed.ctypes.data))
        assert (flag[0], counter[0], counter[1]) == (replay, 0, replay)


@pytest.mark.parametrize("seed", [0, (1 << 64) - 1])
@pytest.mark.parametrize("count", [7, 64, 65, 200])
@pytest.mark.parametrize("tile", [4096, 16384, 131072])
def test_digests_are_those_of_the_core(run: Run, seed: int, count: int, tile: int) -> None:
    rng = np.random.default_rng(count)
    data = random_bytes(400_000)
    nbytes = rng.integers(1, 3000, count)
    nbytes[:3] = [200_000, 4096, 1]
    start = rng.integers(0, len(data) - nbytes)
    position = rng.integers(0, 1 << 60, count)
    position[::2] += (start - position)[::2] % 16
    start[0], position[0] = 32, 5 * 4096 + 32
    rows = np.stack([start + data.ctypes.data, nbytes, position, rng.integers(0, 9, count)], axis=1).astype(np.uint64)
    table, tiles, _ = number_tiles(rows, tile)
    sums, out = np.zeros(18, np.uint64), np.full(18, 5, np.uint64)
    first, second = lane_keys(seed).tolist()
    values = [table.ctypes.data, count, tiles, tile, sums.ctypes.data, out.ctypes.data, 9, first, second]
    run("digest", 3, 64, values)
    wanted = np.zeros((9, 2), np.uint64)
    load(native=True).digest_rows(rows, wanted, seed)
    assert (out.reshape(9, 2) == wanted).all()
    assert not sums.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 128, 128), (1, 1, 1), (2, 130, 260), (2, 136, 264), (1, 129, 7)])
@pytest.mark.parametrize("special", [None, 0.0, float("inf"), float("nan"), 1e-30])
def test_fp8_is_that_of_torch(run: Run, dtype: str, shape: tuple[int, int, int], special: float | None) -> None:
    torch = pytest.importorskip("torch")
    from raynixl.weights.quantising import quantise

    made = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made *= torch.exp2(torch.randint(-12, 5, shape, generator=torch.Generator().manual_seed(2)).float())
    if special is not None:
        made[0, : shape[1] // 2 + 1, : shape[2] // 2 + 1] = special
    values = made.to(getattr(torch, dtype))
    matrices, rows, columns = shape
    down, across = -(-rows // 128), -(-columns // 128)
    stored, scales = torch.empty(shape, dtype=torch.float8_e4m3fn), torch.empty((matrices, down, across))
    quantise(values, stored, scales)
    data = random_bytes(values.numel() * values.element_size())
    data[:] = values.view(torch.uint8).reshape(-1).numpy()
    found, found_scales = poisoned(values.numel()), np.zeros(scales.numel(), np.float32)
    where = [data.ctypes.data, found.ctypes.data, found_scales.ctypes.data]
    run(f"quantise_{dtype}", matrices * down * across, 256, [*where, rows, columns], ends=False)
    wanted = stored.view(torch.uint8).reshape(-1).numpy()
    is_nan = wanted & 0x7F == 0x7F
    assert (found & 0x7F == 0x7F)[is_nan].all()
    assert (found == wanted)[~is_nan].all()
    assert np.array_equal(found_scales, scales.reshape(-1).numpy(), equal_nan=True)
