"""The transfer benchmark with memory of GPUs, over a fake CUDA driver: rows, bytes, baselines, what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_fake import FakeCuda

from raynixl.bench import transfer
from raynixl.bench.gpu import rows_of
from raynixl.bench.layout import Layout
from raynixl.bench.process import TargetProcess
from raynixl.bench.sizes import parse_gpus
from raynixl.bench.spec import CUDA_BASELINES, TransferSpec
from raynixl.errors import ConfigError

TESTS = str(Path(__file__).parents[1])


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, nothing_left: Callable[[], list[str]], fake_cuda: FakeCuda) -> FakeCuda:
    """Two made-up GPUs, here and at the target."""
    target = functools.partial(TargetProcess, "bench_fake_target", {"PYTHONPATH": TESTS})
    monkeypatch.setattr(transfer, "TargetProcess", target)
    return fake_cuda


def run(**settings: Any) -> list[dict[str, Any]]:
    base = {"backend": "nvlink", "memory": "vram", "rounds": 1, "threads": 1}
    return list(transfer.run_transfer(TransferSpec(**(base | settings))))


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize(("blocks", "is_random"), [(1, False), (40, True)])
def test_bytes_of_gpus_are_moved_and_checked_against_every_baseline(
    gpus: FakeCuda, op: str, blocks: int, is_random: bool
) -> None:
    rows = run(sizes=(8, 4099), op=op, blocks=blocks, is_random=is_random, baselines=CUDA_BASELINES)
    impls = ("raynixl", *CUDA_BASELINES)
    assert [(row["block_nbytes"], row["impl"]) for row in rows] == [(n, impl) for n in (8, 4099) for impl in impls]
    assert all(row["verified"] is True for row in rows)
    assert {row["memory"] for row in rows} == {"vram"}
    assert rows[0]["lane"]


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize(("ours", "theirs"), [("arena", "vram"), ("vram", "arena"), ("user", "vram")])
def test_between_host_and_gpu(gpus: FakeCuda, op: str, ours: str, theirs: str) -> None:
    baselines = ("cudamemcpy",) if ours != "user" else ()  # the fake driver wants pinned memory
    rows = run(sizes=(4096,), op=op, memory=ours, target_memory=theirs, blocks=3, baselines=baselines)
    assert [(row["impl"], row["verified"]) for row in rows] == [(impl, True) for impl in ("raynixl", *baselines)]
    assert {row["memory"] for row in rows} == {f"{ours}/{theirs}"}


def test_two_gpus_of_one_host(gpus: FakeCuda) -> None:
    rows = run(sizes=(4096,), gpus=(1, 0), baselines=CUDA_BASELINES)
    assert all(row["verified"] is True for row in rows)


def test_the_copies_of_a_layout_move_every_block_to_its_place() -> None:
    layout = Layout(16, 5, is_random=True)
    rows = rows_of(layout, 1000, 9000)
    assert rows.tolist() == [
        [1000 + 16 * int(a), 9000 + 16 * int(b), 16] for a, b in zip(layout.source_ids, layout.target_ids, strict=True)
    ]
    assert rows.dtype == np.uint64


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"backend": "shm", "memory": "vram"}, "shm carries no memory of a GPU"),
        ({"backend": "nvlink", "memory": "vram", "baselines": ("memcpy",)}, "memcpy is measured with host memory only"),
        ({"backend": "shm", "baselines": ("cudamemcpy",)}, "cudamemcpy copies memory of a GPU"),
        (
            {"backend": "ucx", "memory": "vram", "target_memory": "user", "baselines": ("cudamemcpy",)},
            "does not reach the target's user memory",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TransferSpec((8,), **settings).check()


@pytest.mark.parametrize(("text", "numbers"), [("0", (0, 0)), ("3", (3, 3)), ("0,1", (0, 1))])
def test_gpus_are_one_number_or_two(text: str, numbers: tuple[int, int]) -> None:
    assert parse_gpus(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "0,1,2", "-1"])
def test_what_names_no_gpus_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="are no GPUs"):
        parse_gpus(text)
