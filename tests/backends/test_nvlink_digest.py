"""Digests and FP8 by a GPU, on a driver that is made up: what is handed to the kernels, and what comes back."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cuda_fake import FakeCuda
from cuda_fixtures import fake_driver

from raynixl import BackendUnavailable, TransferTimeout, cuda
from raynixl.backends.nvlink_digest import digest_rows
from raynixl.backends.nvlink_mover import mover
from raynixl.backends.nvlink_quantise import quantise_blocks
from raynixl.native import load

MIB = 1 << 20


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    with fake_driver() as made:
        yield made


@pytest.fixture
def data(fake: FakeCuda) -> Iterator[tuple[int, Any]]:
    """Where random bytes lie on the GPU, and the same on the host."""
    at, same = fake.make(4 * MIB), np.random.default_rng(0).integers(0, 256, 4 * MIB, np.uint8)
    fake.view(at, len(same))[:] = same
    yield at, same
    fake.drop(at)


def on_cpu(data: Any, rows: Any, sums: Any, seed: int) -> Any:
    there = rows.copy()
    there[:, 0] += np.uint64(data.ctypes.data)
    load(native=True).digest_rows(there, sums, seed)
    return sums


@pytest.mark.parametrize("seed", [0, 12345, (1 << 64) - 1])
def test_digests_are_those_of_the_core_and_are_added(data: tuple[int, Any], seed: int) -> None:
    at, same = data
    rng = np.random.default_rng(1)
    nbytes = np.append(rng.integers(0, 9000, 50), [0, 1, 2 * MIB, 4096])
    start = rng.integers(0, len(same) - nbytes)
    rows = np.stack([start, nbytes, rng.integers(0, 1 << 50, len(nbytes)), rng.integers(0, 9, len(nbytes))], axis=1)
    rows = rows.astype(np.uint64)
    before = rng.integers(0, 1 << 62, (9, 2)).astype(np.uint64) * np.uint64(4)
    out = before.copy()
    digest_rows(0, rows + np.array([at, 0, 0, 0], np.uint64), out, seed=seed)
    assert (out == on_cpu(same, rows, before, seed)).all()


def test_sums_are_zeros_before_anything_is_added(fake: FakeCuda, data: tuple[int, Any]) -> None:
    at, same = data
    mover(0)
    rows, out, before = np.array([[at, 5000, 0, 0]], np.uint64), np.zeros((1, 2), np.uint64), len(fake.kernels.launches)
    with fake.held():
        thread = threading.Thread(target=digest_rows, args=(0, rows, out), kwargs={"seed": 1})
        thread.start()
        limit = time.monotonic() + 10.0
        while len(fake.kernels.launches) == before and time.monotonic() < limit:
            time.sleep(0.001)
        while fake.step():  # the latest first, where nothing is waited for
            continue
    thread.join(10.0)
    assert (out == on_cpu(same, rows - np.array([at, 0, 0, 0], np.uint64), np.zeros((1, 2), np.uint64), 1)).all()


def test_no_bytes_need_no_gpu(fake: FakeCuda) -> None:
    out = np.ones((2, 2), np.uint64)
    digest_rows(0, np.array([[4096, 0, 77, 1]], np.uint64), out, seed=3)
    digest_rows(0, np.empty((0, 4), np.uint64), out, seed=3)
    assert (out == 1).all()
    assert not fake.kernels.launches


def test_more_sums_than_one_upload_holds_come_back(data: tuple[int, Any]) -> None:
    at, same = data
    count = 70_000
    rows = np.zeros((count, 4), np.uint64)
    rows[:, 0] = rows[:, 2] = np.arange(count)
    rows[:, 1], rows[:, 3] = 3, np.arange(count)
    out = np.zeros((count, 2), np.uint64)
    picked = np.arange(0, count, 7000)
    digest_rows(0, (rows + np.array([at, 0, 0, 0], np.uint64))[picked], out, seed=8)
    assert (out == on_cpu(same, rows[picked], np.zeros((count, 2), np.uint64), 8)).all()


def test_a_digest_follows_the_stream(fake: FakeCuda, data: tuple[int, Any]) -> None:
    at, same = data
    mover(0)
    stream = fake.work.stream(cuda.primary(0))
    with fake.held():
        fake.work.put(stream, lambda: fake.view(at, 10).__setitem__(slice(None), 9))
        fake.release()
        out = np.zeros((1, 2), np.uint64)
        digest_rows(0, np.array([[at, MIB, 0, 0]], np.uint64), out, seed=1, stream=stream)
    same[:10] = 9
    assert (out == on_cpu(same, np.array([[0, MIB, 0, 0]], np.uint64), np.zeros((1, 2), np.uint64), 1)).all()


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (np.array([[0, 1, 0, 2]], np.uint64), ValueError),
        (np.array([[(1 << 64) - 1, 2, 0, 0]], np.uint64), ValueError),
        (np.array([[0, 2, (1 << 64) - 1, 0]], np.uint64), ValueError),
        (np.array([[0, 1, 0]], np.uint64), TypeError),
        (np.array([[0, 1, 0, 0]], np.int64), TypeError),
    ],
)
def test_rows_that_do_not_fit_are_refused(fake: FakeCuda, rows: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        digest_rows(0, rows, np.zeros((2, 2), np.uint64), seed=0)
    assert not fake.kernels.launches


def test_a_gpu_that_fails_or_is_late_is_an_error_and_nothing_is_added(fake: FakeCuda, data: tuple[int, Any]) -> None:
    mover(0)
    rows, out = np.array([[data[0], 4096, 0, 0]], np.uint64), np.zeros((1, 2), np.uint64)
    fake.fail("cuLaunchKernel", 719)
    with pytest.raises(BackendUnavailable, match="failed"):
        digest_rows(0, rows, out, seed=0)
    stream = fake.work.stream(cuda.primary(0))
    is_over = []
    gc.collect()

    def pieces() -> int:
        return sum(map(len, mover(0).tables._idle.values()))

    before = pieces()

    def spin() -> Iterator[None]:
        while not is_over:
            yield

    fake.work.put(stream, spin)
    with pytest.raises(TransferTimeout, match="digests"):
        digest_rows(0, rows, out, seed=0, stream=stream, timeout=0.05)
    assert not any(cuda.kept(("digests", 0), dict)._idle.values()), "the GPU may still write there"
    gc.collect()
    assert pieces() == max(0, before - 1), "nor is that memory given to others"
    is_over.append(True)
    assert not out.any()
    limit = time.monotonic() + 10.0
    while not all(lane.is_idle for lane in mover(0)._all_lanes()):  # the memory belongs to it until then
        assert time.monotonic() < limit
        time.sleep(0.001)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 128, 128), (2, 130, 300), (3, 1, 5), (0, 4, 4), (2, 0, 7)])
def test_fp8_is_put_on_the_stream(fake: FakeCuda, dtype: str, shape: tuple[int, int, int]) -> None:
    torch = pytest.importorskip("torch")
    from raynixl.weights.quantising import quantise

    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    matrices, rows, columns = shape
    stored = torch.empty(shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty((matrices, -(-rows // 128), -(-columns // 128)))
    if values.numel():
        quantise(values, stored, scales)
    mover(0)
    where = [fake.make(max(1, one.numel() * one.element_size())) for one in (values, stored, scales)]
    raw = values.view(torch.uint8).reshape(-1).numpy()
    fake.view(where[0], len(raw))[:] = raw
    stream = fake.work.stream(cuda.primary(0))
    quantise_blocks(
        0, source=where[0], stored=where[1], scales=where[2], shape=shape, dtype=dtype, stream=stream
    )  # fmt: skip
    assert (fake.view(where[1], stored.numel()) == stored.view(torch.uint8).reshape(-1).numpy()).all()
    found = fake.view(where[2], 4 * scales.numel()).view(np.float32)
    assert (found == scales.reshape(-1).numpy()).all()
    for address in where:
        fake.drop(address)
