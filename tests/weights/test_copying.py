"""What torch copies of one dtype arrives bit by bit, whatever numbers the bits are."""

import pytest
import torch

from raynixl.weights.tensors import _copy_by_torch

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int16,
]


def any_bits(dtype, *shape):
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(dtype)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_parameter", [False, True])
def test_every_bit_arrives_and_no_kernel_sees_numbers(dtype, is_parameter, monkeypatch):
    seen, copy = [], torch._foreach_copy_

    def foreach_copy(targets, sources, **options):
        seen.extend((*targets, *sources))
        copy(targets, sources, **options)

    monkeypatch.setattr(torch, "_foreach_copy_", foreach_copy)
    source = any_bits(dtype, 7, 300)
    target = torch.zeros_like(source)
    if is_parameter:
        target = torch.nn.Parameter(target, requires_grad=dtype.is_floating_point or dtype.is_complex)
    before = target._version
    _copy_by_torch([(target, source), (target.data.t(), source.t())])
    assert torch.equal(bits(target.detach()), bits(source))
    assert not any(one.is_floating_point() or one.is_complex() for one in seen)
    assert target._version > before


def test_conversions_and_conjugates_are_still_numbers():
    wide = torch.tensor([1.0, -2.5, 3.25])
    narrow = torch.zeros(3, dtype=torch.bfloat16)
    conjugate = torch.zeros(2, dtype=torch.complex64)
    values = torch.tensor([1 + 2j, 3 - 4j])
    _copy_by_torch([(narrow, wide), (conjugate, values.conj())])
    assert torch.equal(narrow.float(), wide)
    assert torch.equal(conjugate, torch.tensor([1 - 2j, 3 + 4j]))
