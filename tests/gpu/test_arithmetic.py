"""The kernels that digest and quantise: the same values as on a CPU, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_tools import has_cuda_torch
from kernel_tools import keep_busy, random_bytes, settle, uploaded

from raynixl import cuda
from raynixl.backends.nvlink_digest import digest_rows
from raynixl.backends.nvlink_quantise import quantise_blocks
from raynixl.native import load

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

MIB = 1 << 20


def on_cpu(data: Any, rows: Any, sums: int, seed: int) -> Any:
    there = rows.astype(np.uint64)
    there[:, 0] += np.uint64(data.ctypes.data)
    out = np.zeros((sums, 2), np.uint64)
    load(native=True).digest_rows(there, out, seed)
    return out


def on_gpu(data: Any, rows: Any, sums: int, seed: int) -> Any:
    copy = uploaded(data)
    there = rows.astype(np.uint64)
    there[:, 0] += np.uint64(copy.data.ptr)
    out = np.zeros((sums, 2), np.uint64)
    digest_rows(0, there, out, seed=seed)
    return out


@pytest.mark.parametrize("seed", [0, 1, (1 << 64) - 1])
def test_digests_of_any_rows_are_those_of_the_cpu(seed: int) -> None:
    rng = np.random.default_rng(seed % 1000)
    data = random_bytes(40 * MIB)
    nbytes = np.concatenate([np.arange(70), rng.integers(0, 9000, 3000), rng.integers(0, MIB, 60), [17 * MIB, 4096]])
    start = rng.integers(0, len(data) - nbytes)
    position = rng.integers(0, 1 << 50, len(nbytes))
    position[::3] += start[::3] % 16 - position[::3] % 16  # where 16 bytes at a time can be read
    rows = np.stack([start, nbytes, np.abs(position), rng.integers(0, 40, len(nbytes))], axis=1)
    assert (on_gpu(data, rows, 40, seed) == on_cpu(data, rows, 40, seed)).all()


def test_one_digest_of_much_is_that_of_the_cpu_and_sees_a_flipped_bit() -> None:
    data = random_bytes(256 * MIB)
    rows = np.array([[0, len(data), 5 << 48, 0]], np.uint64)
    first = on_gpu(data, rows, 1, 9)
    assert (first == on_cpu(data, rows, 1, 9)).all()
    data[123_456_789] ^= 16
    assert (on_gpu(data, rows, 1, 9) != first).all()


def test_a_digest_is_added_to_what_is_there_and_follows_the_stream() -> None:
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    copy = uploaded(np.zeros(MIB, np.uint8))
    keep_busy(stream, 0.05)
    with stream:
        copy += 3
    out = np.full((2, 2), (1 << 64) - 5, np.uint64)
    digest_rows(0, np.array([[copy.data.ptr, MIB, 0, 1]], np.uint64), out, seed=4, stream=stream.ptr)
    wanted = on_cpu(np.full(MIB, 3, np.uint8), np.array([[0, MIB, 0, 1]]), 2, 4) - np.uint64(5)
    assert (out == wanted).all()


def kinds_of_values(torch: Any, shape: tuple[int, int, int], seed: int) -> Any:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made = made * torch.exp2(torch.randint(-20, 20, shape, generator=torch.Generator().manual_seed(seed + 1)).float())
    made[0, : shape[1] // 2] *= 1e-3
    made[-1, -1, -1] = 0.0
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape", [(1, 128, 128), (1, 1, 1), (3, 200, 300), (2, 129, 7), (2, 136, 264), (1, 1024, 1536)]
)
def test_fp8_and_scales_are_those_of_torch_on_a_cpu(dtype: str, shape: tuple[int, int, int]) -> None:
    check_quantising(lambda torch: kinds_of_values(torch, shape, 3).to(getattr(torch, dtype)), dtype)


@pytest.mark.parametrize("special", [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3.4e38, 1e-38])
def test_fp8_of_special_values_is_that_of_torch_on_a_cpu(special: float) -> None:
    def make(torch: Any) -> Any:
        values = torch.randn((1, 128, 256), generator=torch.Generator().manual_seed(1))
        values[0, 5, 7] = special
        values[0, :, 128:] = special
        return values

    check_quantising(make, "float32")


def test_every_value_of_sixteen_bits_is_rounded_as_torch_does_on_a_cpu() -> None:
    def make(torch: Any) -> Any:
        bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
        small = torch.where(bits.abs() <= 448.0, bits, torch.zeros(()))  # scale 1: they are rounded as they are
        small.view(4, -1)[:, 0] = 448.0
        return small.view(4, 128, 128)

    check_quantising(make, "float32")


def check_quantising(make: Any, dtype: str) -> None:
    if not has_cuda_torch():
        pytest.skip("needs torch with CUDA")
    import torch

    from raynixl.weights.quantising import quantise

    values = make(torch)
    matrices, rows, columns = values.shape
    scales = torch.empty((matrices, -(-rows // 128), -(-columns // 128)))
    stored = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    quantise(values, stored, scales)
    there, there_scales = values.cuda(), torch.full(scales.shape, -1.0, device="cuda")
    there_stored = torch.full(values.shape, 77, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    quantise_blocks(
        0, source=there.data_ptr(), stored=there_stored.data_ptr(), scales=there_scales.data_ptr(),
        shape=(matrices, rows, columns), dtype=dtype, stream=cuda.stream_handle(stream),
    )  # fmt: skip
    settle()
    found, wanted = there_stored.cpu().numpy(), stored.view(torch.uint8).numpy()
    is_nan = (wanted & 0x7F) == 0x7F
    assert ((found & 0x7F) == 0x7F)[is_nan].all()
    assert (found == wanted)[~is_nan].all()
    assert np.array_equal(there_scales.cpu().numpy(), scales.numpy(), equal_nan=True)
