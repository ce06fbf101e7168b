"""On a GPU our kernels digest and quantise, on the stream of whoever asks; without them torch does."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raynixl.errors import BackendUnavailable
from raynixl.weights.device_digest import digest_device
from raynixl.weights.digest import digest_rows
from raynixl.weights.quantising import quantise

STREAM = 0x57


class OnGpu:
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 1)

    def __init__(self, tensor):
        self._tensor = tensor

    def detach(self):
        return self

    def __getattr__(self, name):
        return getattr(self._tensor, name)


@pytest.fixture(autouse=True)
def _stream(monkeypatch):
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM + device.index))


def rows_of(data):
    return np.array([(data.data_ptr(), data.numel(), 4096, 0)], np.uint64)


def test_the_kernel_digests_what_is_on_a_gpu_after_what_is_on_the_callers_stream(monkeypatch):
    calls = []

    def kernel(device, rows, out, *, seed, stream):
        calls.append((device, seed, stream))
        digest_rows(rows, out, seed=seed)

    monkeypatch.setattr("raynixl.backends.nvlink_digest.digest_rows", kernel)
    data = torch.arange(5000, dtype=torch.uint8)
    out, wanted = np.zeros((1, 2), np.uint64), np.zeros((1, 2), np.uint64)
    digest_device([OnGpu(data)], rows_of(data), out, seed=3)
    digest_rows(rows_of(data), wanted, seed=3)
    assert calls == [(1, 3, STREAM + 1)]
    assert np.array_equal(out, wanted)


def unavailable(*_arguments, **_options):
    raise BackendUnavailable("there is no cupy to compile kernels with")


def test_torch_digests_where_no_kernel_can_be_compiled(monkeypatch):
    monkeypatch.setattr("raynixl.backends.nvlink_digest.digest_rows", unavailable)
    data = torch.arange(5000, dtype=torch.uint8)
    out, wanted = np.zeros((1, 2), np.uint64), np.zeros((1, 2), np.uint64)
    flat = OnGpu(data)
    monkeypatch.setattr(OnGpu, "__getitem__", lambda self, key: data[key], raising=False)
    digest_device([flat], rows_of(data), out, seed=3)
    digest_rows(rows_of(data), wanted, seed=3)
    assert np.array_equal(out, wanted)


def test_nothing_to_digest_asks_nobody(monkeypatch):
    monkeypatch.setattr("raynixl.backends.nvlink_digest.digest_rows", unavailable)
    out = np.zeros((1, 2), np.uint64)
    digest_device([], np.zeros((0, 4), np.uint64), out, seed=1)
    assert not out.any()


def placed(dtype=torch.float32, shape=(2, 130, 300)):
    source = torch.randn(shape).to(dtype)
    stored = torch.zeros(shape, dtype=torch.float8_e4m3fn)
    scales = torch.zeros((*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)))
    return [OnGpu(one) for one in (source, stored, scales)]


def test_the_kernel_quantises_what_is_on_a_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "raynixl.backends.nvlink_quantise.quantise_blocks", lambda device, **how: calls.append((device, how))
    )
    source, stored, scales = placed(torch.bfloat16)
    quantise(source, stored, scales)
    [(device, how)] = calls
    assert device == 1
    assert (how["source"], how["stored"], how["scales"]) == tuple(one.data_ptr() for one in (source, stored, scales))
    assert (how["shape"], how["dtype"], how["stream"]) == ((2, 130, 300), "bfloat16", STREAM + 1)


@pytest.mark.parametrize("why", ["a dtype that it does not take", "memory elsewhere", "no kernels"])
def test_torch_quantises_what_the_kernel_does_not(monkeypatch, why):
    if why == "no kernels":
        monkeypatch.setattr("raynixl.backends.nvlink_quantise.quantise_blocks", unavailable)
    else:
        monkeypatch.setattr(
            "raynixl.backends.nvlink_quantise.quantise_blocks", lambda *_, **__: pytest.fail("the kernel was asked")
        )
    source, stored, scales = placed(torch.float64 if why.startswith("a dtype") else torch.float32)
    wanted, wanted_scales = torch.zeros_like(stored._tensor), torch.zeros_like(scales._tensor)
    quantise(source._tensor, wanted, wanted_scales)
    if why == "memory elsewhere":
        stored = stored._tensor
    quantise(source, stored, scales)
    assert torch.equal(getattr(stored, "_tensor", stored).view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scales._tensor, wanted_scales)
