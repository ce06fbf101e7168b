"""Every way in which a loader copies is understood, down to the element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorder_tools import one

pytestmark = pytest.mark.pure

COPIES = {
    "transposed": ((4, 6), (6, 4), lambda p, w: p.data.copy_(w.t())),
    "transposed and made contiguous": ((4, 6), (6, 4), lambda p, w: p.data.copy_(w.t().contiguous())),
    "transposed and flattened": ((4, 6), (24,), lambda p, w: p.data.copy_(w.t().reshape(-1))),
    "flattened into a part": ((4, 6), (40,), lambda p, w: p.data[3:27].copy_(w.flatten())),
    "a run of the flat tensor": ((4, 6), (13,), lambda p, w: p.data.copy_(w.flatten()[5:18])),
    "reshaped": ((4, 6), (3, 8), lambda p, w: p.data.copy_(w.reshape(3, 8))),
    "reshaped at both ends": ((4, 6), (3, 8), lambda p, w: p.data.view(2, 12).copy_(w.view(2, 12))),
    "every second row": ((8, 3), (4, 3), lambda p, w: p.data.copy_(w[1::2])),
    "interleaved": ((8, 3), (8, 3), lambda p, w: (p.data[::2].copy_(w[:4]), p.data[1::2].copy_(w[4:]))),
    "heads interleaved": (
        (12, 5),
        (12, 5),
        lambda p, w: p.data.copy_(w.view(2, 3, 2, 5).transpose(0, 1).reshape(12, 5)),
    ),
    "a rank's heads out of interleaved ones": (
        (12, 5),
        (6, 5),
        lambda p, w: p.data.copy_(w.view(2, 3, 2, 5).transpose(0, 1).reshape(12, 5)[3:9]),
    ),
    "chosen rows": ((8, 3), (4, 3), lambda p, w: p.data.copy_(w[torch.tensor([6, 0, 1, 7])])),
    "selected columns": ((3, 8), (3, 2), lambda p, w: p.data.copy_(w.index_select(1, torch.tensor([5, 2])))),
    "masked rows": ((4, 3), (2, 3), lambda p, w: p.data.copy_(w[torch.tensor([True, False, False, True])])),
    "into chosen rows": ((2, 3), (5, 3), lambda p, w: p.data.index_copy_(0, torch.tensor([4, 1]), w)),
    "one row put at chosen rows": ((1, 1, 3), (5, 3), lambda p, w: p.data.__setitem__(torch.tensor([0, 3]), w)),
    "put at chosen rows": ((2, 3), (5, 3), lambda p, w: p.data.__setitem__(torch.tensor([0, 3]), w)),
    "joined": ((4, 3), (6, 3), lambda p, w: p.data.copy_(torch.cat([w[3:], w, w[:1]]))),
    "stacked": (
        (4, 3),
        (2, 4, 3),
        lambda p, w: p.data.copy_(torch.stack([w, w])),
    ),
    "repeated": ((2, 3), (4, 9), lambda p, w: p.data.copy_(w.repeat(2, 3))),
    "repeated row by row": ((2, 3), (4, 3), lambda p, w: p.data.copy_(w.repeat_interleave(2, 0))),
    "broadcast": ((3,), (4, 3), lambda p, w: p.data.copy_(w)),
    "one value everywhere": ((), (4, 3), lambda p, w: p.data.fill_(w)),
    "through a buffer": (
        (4, 3),
        (6, 3),
        lambda p, w: (buffer := torch.zeros(6, 3), buffer[1:5].copy_(w), p.data.copy_(buffer)),
    ),
    "through a blank buffer like it": (
        (4, 3),
        (4, 3),
        lambda p, w: (
            buffer := torch.empty_like(w),
            buffer[:2].copy_(w[2:]),
            buffer[2:].copy_(w[:2]),
            p.data.copy_(buffer),
        ),
    ),
    "through a zeroed buffer of its kind": (
        (4, 3),
        (6, 3),
        lambda p, w: (buffer := w.new_zeros(6, 3), buffer[1:5].copy_(w), p.data.copy_(buffer)),
    ),
    "padded on all sides": ((4, 3), (8, 4), lambda p, w: p.data.copy_(torch.nn.functional.pad(w, (0, 1, 1, 3)))),
    "padded and cut": ((4, 3), (4, 2), lambda p, w: p.data.copy_(torch.nn.functional.pad(w, (-1, 0, 1, -1)))),
    "flipped": ((4, 3), (4, 3), lambda p, w: p.data.copy_(w.flip(0, 1))),
    "rolled": ((5, 3), (5, 3), lambda p, w: p.data.copy_(w.roll(2, 0))),
    "written twice": ((4, 3), (4, 3), lambda p, w: (p.data.copy_(w), p.data[1:3, 1:].copy_(w[2:, :2]))),
    "padded by zeros": (
        (4, 3),
        (6, 4),
        lambda p, w: ((p.data.zero_(), p.data[:4, :3].copy_(w))),
    ),
    "split, unbound and put by parts": (
        (4, 3),
        (4, 3),
        lambda p, w: [
            row.copy_(part)
            for row, part in zip(
                p.data.unbind(0), w[1:].split([1, 2])[0].unbind(0) + w.chunk(2)[1].unbind(0), strict=False
            )
        ],
    ),
    "to another device": ((4, 3), (4, 3), lambda p, w: p.data.copy_(w.to("cpu").clone())),
    "by foreach": ((4, 3), (4, 3), lambda p, w: torch._foreach_copy_([p.data[:1], p.data[1:]], [w[:1], w[1:]])),
    "a diagonal": ((4, 4), (4,), lambda p, w: p.data.copy_(w.diagonal())),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_way_of_copying_is_understood(way):
    recording = one(*COPIES[way])
    assert recording.full == ()
    assert recording.unsupported == ()


@given(data=st.data())
def test_any_chain_of_views_and_copies_is_understood(data):
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    steps = data.draw(st.lists(st.sampled_from(sorted(STEPS)), max_size=5))
    seeds = data.draw(st.lists(st.integers(0, 1000), min_size=5, max_size=5))

    def change(w):
        for step, seed in zip(steps, seeds, strict=False):
            w = STEPS[step](w, seed)
        return w

    into = tuple(change(torch.zeros(shape)).shape)
    recording = one(tuple(shape), into, lambda p, w: p.data.copy_(change(w)))
    assert recording.full == ()
    assert recording.unsupported == ()


def _narrow(w, seed):
    dim = seed % max(1, w.dim())
    if w.dim() == 0 or w.shape[dim] == 0:
        return w
    first = seed // 7 % w.shape[dim]
    return w.narrow(dim, first, 1 + seed // 49 % (w.shape[dim] - first))


def _regroup(w, seed):
    count = w.numel()
    inner = [size for size in range(1, count + 1) if count % size == 0] or [1]
    return w.reshape(-1, inner[seed % len(inner)])


STEPS = {
    "narrow": _narrow,
    "turn": lambda w, seed: w.permute([(at + seed) % w.dim() for at in range(w.dim())]) if w.dim() else w,
    "swap": lambda w, seed: w.transpose(0, -1) if w.dim() else w,
    "regroup": _regroup,
    "flatten": lambda w, seed: w.reshape(-1),
    "step": lambda w, seed: w[seed % 2 :: 2] if w.dim() and w.shape[0] > 1 else w,
    "own": lambda w, seed: w.contiguous().clone(),
    "join": lambda w, seed: torch.cat([w[:1], w]) if w.dim() else w,
    "pick": lambda w, seed: w[torch.arange(w.shape[0] - 1, -1, -1)] if w.dim() else w,
    "widen": lambda w, seed: w.unsqueeze(0).expand(2, *w.shape),
}
