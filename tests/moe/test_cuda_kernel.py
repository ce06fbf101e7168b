"""The kernels' sources and their launches: names and sizes are those that Python knows, grids leave room for others."""

from __future__ import annotations

import ctypes
import itertools
import re

import pytest

from raynixl.backends.nvlink_kernel import joined
from raynixl.errors import BackendUnavailable
from raynixl.moe import cuda_structs
from raynixl.moe.cuda_frame import Frame, fields_at
from raynixl.moe.cuda_kernel import NAMES, SOURCES, THREADS, Kernels, grid_of

pytestmark = pytest.mark.pure


def test_every_file_of_kernels_is_compiled() -> None:
    assert set(SOURCES) == set(SOURCES[0].parent.glob("*"))


def test_the_names_are_those_in_the_sources() -> None:
    found = re.findall(r"^__global__ void .*?raynixl_moe_(\w+)\(", joined(SOURCES), re.MULTILINE)
    assert sorted(found) == sorted(NAMES)


def test_sizes_and_bounds_are_those_in_the_sources() -> None:
    source = joined(SOURCES)
    sizes = {name: int(size) for name, size in re.findall(r"sizeof\((\w+)\) == (\d+)", source)}
    sizes["Line"] = cuda_structs.LINE_NBYTES
    structs = "Column", "Line", "Layer", "Page", "Send", "Arrive", "Order", "Take", "Give", "Sum", "Mask"
    assert sizes == {name: ctypes.sizeof(getattr(cuda_structs, name)) for name in structs}
    constants = dict(re.findall(r"\b(k\w+) = (\d+)\b", source))
    known = {
        "kRanks": cuda_structs.RANKS, "kColumns": cuda_structs.COLUMNS, "kLocalExperts": cuda_structs.LOCAL_EXPERTS,
        "kTerms": cuda_structs.TOPK, "kLineNbytes": cuda_structs.LINE_NBYTES, "kThreads": THREADS,
        "kRange": cuda_structs.Refusal.RANGE, "kDiffers": cuda_structs.Refusal.DIFFERS,
        "kConfig": cuda_structs.Refusal.CONFIG,
        "kDamaged": cuda_structs.Refusal.DAMAGED, "kSums": cuda_structs.Giving.SUMS,
        "kGivePairs": cuda_structs.Giving.PAIRS, "kApart": cuda_structs.Summing.APART,
    }  # fmt: skip
    assert {name: int(constants[name]) for name in known} == known


@pytest.mark.parametrize("struct", ["Layer", "Page", "Send", "Take", "Give", "Sum", "Order", "Arrive", "Mask", "Line"])
def test_fields_come_in_the_order_of_the_sources(struct: str) -> None:
    body = re.search(rf"^struct {struct} {{\n(.*?)^}};", joined(SOURCES), re.MULTILINE | re.DOTALL)
    assert body is not None
    lines = re.sub(r"//.*", "", body[1])
    found = re.findall(r"(\w+)(?:\[\w+\])?\s*[,;]", lines)
    assert found == [name for name, _ in getattr(cuda_structs, struct)._fields_]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 16, 64])
@pytest.mark.parametrize("rows", [0, 1, 8, 128, 4096])
def test_grids_hold_all_ranks_and_no_more_than_may_wait(ranks: int, rows: int) -> None:
    for name in ("send", "give", "take"):
        grid = grid_of(name, ranks, rows, 14336, resident=264, waiting=131)
        assert grid % ranks == 0
        assert ranks <= grid <= (131 if name == "take" else 264)
    assert 1 <= grid_of("sum", ranks, rows, 14336, resident=264, waiting=131) <= 131
    assert grid_of("take", 64, rows, 14336, resident=264, waiting=5) == 5
    assert grid_of("arrive", ranks, rows, 0, resident=264, waiting=131) == 1


def test_the_parts_of_a_window_lie_side_by_side() -> None:
    for ranks, capacity, experts in [(1, 1, 0), (3, 8, 5), (64, 128, 256)]:
        frame = Frame(ranks, capacity, 14464, 14336, capacity, experts)
        parts = [
            (frame.lines_at[0], 128 * ranks), (frame.lines_at[1], 128 * ranks), (frame.notices_at, 8 * ranks),
            (frame.waits_at, 16 * ranks), (frame.loads_at, 8 * ranks * frame.loads_width),
            (frame.in_at, 2 * ranks * capacity * 14464), (frame.back_at, 2 * ranks * capacity * 14336),
            (frame.nbytes, 0),
        ]  # fmt: skip
        for (start, nbytes), (after, _) in itertools.pairwise(parts):
            assert start % 64 == 0
            assert start + nbytes <= after < start + nbytes + 512 * ranks + 512
        assert frame.head_nbytes == frame.in_at
        assert frame.loads_width >= max(1, experts)


def test_fields_of_a_row_do_not_overlap() -> None:
    assert fields_at([14336, 448, 32, 32, 4]) == ([0, 14336, 14784, 14816, 14848], 14976)
    assert fields_at([]) == ([], 128)
    assert fields_at([3, 0, 17]) == ([0, 16, 16], 128)


def test_nvrtc_compiles_them_for_a_gpu_that_is_not_there() -> None:
    pytest.importorskip("cupy", reason="needs cupy, which brings NVRTC")
    from raynixl.backends.nvlink_kernel import image_for

    try:
        image = image_for("sm_90", sources=SOURCES)
    except BackendUnavailable as exc:
        if "no compiler" in exc.message:
            pytest.skip(exc.message)
        raise
    assert image[:4] == b"\x7fELF"


def test_ranks_that_share_a_gpu_leave_half_of_it_to_what_they_wait_for() -> None:
    alone = Kernels(0, 0, {}, 132)
    assert alone.grid("take", 4, 4096, 14336) == 132
    assert alone.grid("take", 4, 4096, 14336, waits=False) == 264
    for sharing in (2, 4, 8, 200):
        shared = Kernels(0, 0, {}, 132, sharing)
        for name in ("take", "sum"):
            assert sharing * shared.grid(name, 4, 4096, 14336) <= max(66, sharing)
