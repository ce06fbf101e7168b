"""Ranks whose kernels run on the host: each in a thread of its own, with a window, a layer and a page of its own."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from moe_kernels_host import library, run_kernel
from torch import Tensor

from raynixl.moe.calls import CODES
from raynixl.moe.cuda_frame import Frame, fields_at
from raynixl.moe.cuda_structs import (
    NOWHERE,
    STATUSES,
    Arrive,
    Column,
    Give,
    Giving,
    Kind,
    Layer,
    Mask,
    Order,
    Page,
    Refusal,
    Send,
    Sum,
    Summing,
    Take,
)
from raynixl.moe.placement import Placement
from raynixl.moe.reference import Setting, Tokens

PATIENCE = 60.0
POISON = 0x5A
SECOND = 10**9


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def poisoned(*shape: int, dtype: torch.dtype, margin: int = 64) -> Tensor:
    """A tensor full of bytes that nobody wants, within memory that nobody may write to."""
    numel = int(np.prod(shape))
    raw = torch.full((numel * dtype.itemsize + 2 * margin,), POISON, dtype=torch.uint8)
    return raw[margin : margin + numel * dtype.itemsize].view(dtype).reshape(shape)


def columns(tensors: Sequence[Tensor], starts: Sequence[int]) -> Any:
    """Tensors [rows, ...] whose rows travel, as a launch is told of them."""
    made = (Column * 8)()
    for n, (tensor, at) in enumerate(zip(tensors, starts, strict=False)):
        nbytes = tensor[0].numel() * tensor.element_size() if len(tensor) else 0
        made[n] = Column(tensor.data_ptr(), tensor.stride(0) * tensor.element_size() if len(tensor) else 0, nbytes, at)
    return made


@dataclass(eq=False)
class Held:
    """What a handle keeps, and what a dispatch returned."""

    row_of: Tensor
    holder_of: Tensor
    sent: Tensor
    weights: Tensor | None
    tokens_count: int
    x: Tensor | None = None
    scales: Tensor | None = None
    extra: tuple[Tensor, ...] = ()
    topk_idx: Any = None
    topk_weights: Any = None
    counts: Any = None
    offsets: Any = None
    sources: Any = None
    tokens: Any = None
    row_ids: Any = None
    row_weights: Any = None
    rows_by_source: Any = None
    positions: Any = None
    place_weights: Any = None
    layout: str = "tokens"
    weights_at: str = "holder"


@dataclass(eq=False)
class Gpu:
    """One rank: what its GPU would have."""

    me: int
    frame: Frame
    grid: int = 7
    threads: int = 64
    deadline: float = 20.0
    at_once: int = 1
    layer: Layer = field(default_factory=Layer)
    page: Page = field(default_factory=Page)
    tickets: int = 0

    def __post_init__(self) -> None:
        raw = np.full(self.frame.nbytes + 256, POISON, np.uint8)
        skew = -raw.ctypes.data % 256
        self.window = raw[skew : skew + self.frame.nbytes]
        self.window[: self.frame.head_nbytes] = 0

    def begin(self, windows: dict[int, int], operation: int = 1 << 32, mask: int = 0) -> None:
        """What the host uploads."""
        made = self.frame.layer(self.me, windows, page=ctypes.addressof(self.page), operation=operation, mask=mask)
        ctypes.memmove(ctypes.addressof(self.layer), ctypes.addressof(made), ctypes.sizeof(Layer))

    @property
    def refusals(self) -> dict[int, Refusal]:
        """Whose lines were refused, and why, the last time."""
        return {rank: Refusal(told % STATUSES) for rank, told in enumerate(self.page.refusals) if told}

    @property
    def at(self) -> int:
        """The layer's address."""
        return ctypes.addressof(self.layer)

    def run(self, name: str, arguments: Any, grid: int | None = None) -> None:
        """Launch, and wait for its end."""
        grid = self.grid if grid is None else grid
        run_kernel(f"raynixl_moe_{name}", grid, self.threads, arguments, self.at_once)

    def arrive(self, kind: Kind, *, loads: int = 0, signature: int = 0, sent: Tensor | None = None) -> None:
        """Wait for the lines, as the host would."""
        self.tickets += 1
        self.run("arrive", Arrive(
            layer=self.at, signature=signature, deadline=int(self.deadline * SECOND), ticket=self.tickets,
            sent=address(sent), kind=kind, ranks=self.frame.ranks, loads_count=loads,
        ), 1)  # fmt: skip
        assert self.page.ticket == self.tickets

    def mask(self, ranks: int, told: int = 0) -> None:
        """Mask ranks."""
        self.run("mask", Mask(layer=self.at, mask=ranks, told=told), 1)


@dataclass(frozen=True, eq=False)
class Form:
    """The fields of a row, and where they lie."""

    starts: list[int]
    row_nbytes: int
    ids_at: int
    weights_at: int
    token_at: int

    @staticmethod
    def of(tensors: Sequence[Tensor], topk: int, *, weighted: bool) -> Form:
        """The form of rows of these columns."""
        widths = [one.shape[1:].numel() * one.element_size() for one in tensors]
        starts, nbytes = fields_at([*widths, 4 * topk, *([4 * topk] if weighted else []), 4])
        at = len(tensors)
        return Form(starts, nbytes, starts[at], starts[at + 1] if weighted else NOWHERE, starts[-1])


def send(gpu: Gpu, setting: Setting, given: Tokens, *, extra: Sequence[Tensor] = (), signature: int = 0,
         status: int = 0) -> Held:  # fmt: skip
    """The first half of a dispatch."""
    tensors = [given.x, *([] if given.scales is None else [given.scales]), *extra]
    weights = given.topk_weights if setting.weights_at == "holder" else None
    tokens, topk = given.topk_idx.shape
    form, ranks = Form.of(tensors, topk, weighted=weights is not None), gpu.frame.ranks
    placement = Placement(setting.holders)
    held = Held(
        torch.full((tokens, ranks), 77, dtype=torch.int32), torch.full((tokens, topk), 77, dtype=torch.int32),
        torch.zeros(ranks, dtype=torch.int32), given.topk_weights, tokens,
    )  # fmt: skip
    ids = given.topk_idx.contiguous()
    holders, local = torch.from_numpy(placement.holders.copy()), torch.from_numpy(placement.local.copy())
    gpu.run("send", Send(
        layer=gpu.at, columns=columns(tensors, form.starts), ids=address(ids), weights=address(weights),
        holders=address(holders), local=address(local), row_of=address(held.row_of), holder_of=address(held.holder_of),
        sent=address(held.sent), signature=signature, columns_count=len(tensors), row_nbytes=form.row_nbytes,
        ids_at=form.ids_at, weights_at=form.weights_at, token_at=form.token_at, ids_nbytes=ids.element_size(),
        tokens=tokens, topk=topk, experts=len(setting.holders), loads_count=gpu.frame.experts, ranks=ranks,
        status=status,
    ))  # fmt: skip
    return held


def take(gpu: Gpu, setting: Setting, given: Tokens, held: Held, *, extra: Sequence[Tensor] = (), waits: bool = False,
         signature: int = 0, expected: Tensor | None = None, waited: Tensor | None = None) -> Held:  # fmt: skip
    """The second half; in layouts without fixed places the lines are waited for before."""
    tensors = [given.x, *([] if given.scales is None else [given.scales]), *extra]
    topk, ranks, capacity = given.topk_idx.shape[1], gpu.frame.ranks, gpu.frame.capacity
    weighted = given.topk_weights is not None and setting.weights_at == "holder"
    form, is_fixed, local = Form.of(tensors, topk, weighted=weighted), setting.layout == "slots", gpu.frame.experts
    if not waits:
        gpu.arrive(Kind.DISPATCH, loads=local, signature=signature)
    counts = list(gpu.page.counts[:ranks]) if expected is None else expected.tolist()
    rows = ranks * capacity if is_fixed else sum(counts)
    held.layout, held.weights_at = setting.layout, setting.weights_at
    held.positions = held.place_weights = held.offsets = None
    places = rows
    if setting.layout == "experts":
        loads = gpu.page.experts[:local]
        places = sum(-(-load // setting.alignment) * setting.alignment for load in loads)
        held.positions = poisoned(rows, topk, dtype=torch.int32)
        held.place_weights = poisoned(places, dtype=torch.float32) if weighted else None
        held.offsets = poisoned(local + 1, dtype=torch.int64)
    outs = [poisoned(places, *one.shape[1:], dtype=one.dtype) for one in tensors]
    ids = poisoned(rows, topk, dtype=given.topk_idx.dtype)
    held.row_ids, held.tokens = poisoned(rows, topk, dtype=torch.int32), poisoned(rows, dtype=torch.int32)
    weights = held.row_weights = None
    if weighted:
        weights, held.row_weights = (poisoned(rows, topk, dtype=torch.float32) for _ in range(2))
    held.rows_by_source = torch.full((ranks,), 77, dtype=torch.int32)
    held.counts = torch.full((local,), 77, dtype=torch.int64)
    if setting.layout == "experts":
        gpu.run("order", Order(
            layer=gpu.at, columns=columns(outs, form.starts), positions=address(held.positions),
            offsets=address(held.offsets), place_weights=address(held.place_weights), columns_count=len(outs),
            row_nbytes=form.row_nbytes, ids_at=form.ids_at, topk=topk, ranks=ranks, local_experts=local,
            alignment=setting.alignment,
        ), max(1, local))  # fmt: skip
    gpu.run("take", Take(
        layer=gpu.at, columns=columns(outs, form.starts), ids=address(ids), row_ids=address(held.row_ids),
        weights=address(weights), row_weights=address(held.row_weights), tokens=address(held.tokens),
        counts=address(held.rows_by_source), experts=address(held.counts), expected=address(expected),
        positions=address(held.positions), place_weights=address(held.place_weights), signature=signature,
        deadline=int(gpu.deadline * SECOND), columns_count=len(outs), row_nbytes=form.row_nbytes, ids_at=form.ids_at,
        weights_at=form.weights_at, token_at=form.token_at, ids_nbytes=given.topk_idx.element_size(), topk=topk,
        ranks=ranks, loads_count=local, is_packed=not is_fixed, waits=waits, waited=address(waited),
        waited_count=0 if waited is None else len(waited),
    ))  # fmt: skip
    held.sources = torch.repeat_interleave(torch.arange(ranks, dtype=torch.int32), held.rows_by_source)
    held.x, rest = outs[0], outs[1:]
    held.scales, held.extra = (rest[0], tuple(rest[1:])) if given.scales is not None else (None, tuple(rest))
    held.topk_idx, held.topk_weights = ids, held.place_weights if setting.layout == "experts" else weights
    if is_fixed:
        held.x, held.topk_idx = held.x.view(ranks, capacity, -1), ids.view(ranks, capacity, topk)
        held.topk_weights = None if weights is None else weights.view(ranks, capacity, topk)
    return held


def give(gpu: Gpu, y: Tensor, held: Held, *, beside: Tensor | None = None, signature: int = 0, status: int = 0) -> None:
    """The first half of a combine."""
    by_pair, pairs = held.weights_at == "source", held.positions
    mode = Giving.PAIRS if by_pair else Giving.SUMS if held.layout == "experts" else Giving.ROWS
    if by_pair and held.layout != "experts":
        valid = held.row_ids.reshape(-1) >= 0
        pairs = torch.where(valid, valid.cumsum(0) - 1, -1).to(torch.int32)
    flat = y.reshape(-1, y.shape[-1]) if y.is_contiguous() else y
    topk = held.row_ids.shape[1]
    (_, beside_at), item_nbytes = fields_at([flat.shape[1] * flat.element_size(), 4 if by_pair else 4 * topk])
    gpu.run("give", Give(
        layer=gpu.at, y=flat.data_ptr(), y_stride=flat.stride(0) * flat.element_size(), beside=address(beside),
        pairs=address(pairs), weights=address(held.row_weights), row_ids=address(held.row_ids),
        counts=address(held.rows_by_source), signature=signature, hidden=flat.shape[1], dtype=CODES[flat.dtype],
        item_nbytes=item_nbytes, beside_at=NOWHERE if beside is None else beside_at, topk=topk, ranks=gpu.frame.ranks,
        mode=mode, is_packed=held.layout != "slots", status=status, y_rows=len(flat),
    ))  # fmt: skip


def add_up(gpu: Gpu, y: Tensor, held: Held, *, biases: Sequence[Tensor] = (), out: Tensor | None = None,
           beside: bool = False, renormalises: bool = False, apart: bool = False, waits: bool = True,
           signature: int = 0, waited: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The second half."""
    by_pair, topk, hidden = held.weights_at == "source", held.holder_of.shape[1], y.shape[-1]
    rows = held.tokens_count * (topk if apart else 1)
    out = poisoned(rows, hidden, dtype=y.dtype) if out is None else out
    back = poisoned(held.tokens_count, topk, dtype=torch.float32) if beside else None
    (_, beside_at), item_nbytes = fields_at([hidden * y.element_size(), 4 if by_pair else 4 * topk])
    if not waits:
        gpu.arrive(Kind.COMBINE, signature=signature, sent=held.sent)
    strides = [one.stride(0) * one.element_size() if one.dim() == 2 else 0 for one in biases]
    arguments = Sum(
        layer=gpu.at, row_of=address(held.row_of), holder_of=address(held.holder_of), sent=address(held.sent),
        weights=address(held.weights), out=out.data_ptr(), out_stride=out.stride(0) * out.element_size(),
        out_weights=address(back), signature=signature, deadline=int(gpu.deadline * SECOND), tokens=held.tokens_count,
        topk=topk, ranks=gpu.frame.ranks, hidden=hidden, dtype=CODES[y.dtype], out_dtype=CODES[out.dtype],
        bias_dtype=CODES[biases[0].dtype] if biases else 0, bias_count=len(biases), item_nbytes=item_nbytes,
        beside_at=beside_at if beside else NOWHERE,
        mode=Summing.APART if apart else Summing.PAIRS if by_pair else Summing.ROWS, renormalises=renormalises,
        waits=waits, waited=address(waited), waited_count=0 if waited is None else len(waited),
    )  # fmt: skip
    for n, bias in enumerate(biases):
        arguments.biases[n], arguments.bias_strides[n] = bias.data_ptr(), strides[n]
    gpu.run("sum", arguments)
    return out, back


class Crew:
    """So many ranks, which reach each other's windows."""

    def __init__(self, frame: Frame, ranks: int | None = None, **options: Any) -> None:
        library()
        self.gpus = [Gpu(rank, frame, **options) for rank in range(frame.ranks if ranks is None else ranks)]
        self.windows = {gpu.me: gpu.window.ctypes.data for gpu in self.gpus}
        for gpu in self.gpus:
            gpu.begin(self.windows)

    def each(self, work: Callable[[Gpu], Any], ranks: Sequence[int] | None = None) -> list[Any]:
        """Have ranks work at the same time; what each returns, None for those that are not asked."""
        found: list[Any] = [None] * len(self.gpus)
        failed: list[BaseException] = []

        def one(gpu: Gpu) -> None:
            try:
                found[gpu.me] = work(gpu)
            except BaseException as exc:  # noqa: BLE001 - raised below
                failed.append(exc)

        chosen = self.gpus if ranks is None else [self.gpus[rank] for rank in ranks]
        threads = [threading.Thread(target=one, args=(gpu,), daemon=True) for gpu in chosen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a kernel does not end"
        if failed:
            raise failed[0]
        return found
