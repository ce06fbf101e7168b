"""Nothing: arguments with which kernels take part in an operation without rows, or run without any operation at all."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from raynixl.moe.cuda_structs import NOWHERE, Arrive, Give, Kind, Layer, Mask, Order, Refusal, Send, Sum, Take

if TYPE_CHECKING:
    from raynixl.moe.cuda_layer import GpuLayer

_LEAST_NBYTES = 16


def send_nothing(layer: GpuLayer, topk: int, status: Refusal) -> Send:
    """Return how a dispatch begins for who has no rows, and says why."""
    return Send(
        layer=layer.address, row_nbytes=_LEAST_NBYTES, ids_at=NOWHERE, weights_at=NOWHERE, token_at=NOWHERE,
        ids_nbytes=4, topk=topk, ranks=layer.ranks, status=status,
    )  # fmt: skip


def take_nothing(layer: GpuLayer, topk: int, deadline: int) -> Take:
    """Return how a dispatch ends of which nothing is taken."""
    return Take(
        layer=layer.address, deadline=deadline, topk=topk, ranks=layer.ranks, ids_at=NOWHERE, weights_at=NOWHERE,
        token_at=NOWHERE, ids_nbytes=4, row_nbytes=_LEAST_NBYTES, is_packed=1, waits=1,
    )  # fmt: skip


def give_nothing(layer: GpuLayer, topk: int, status: Refusal) -> Give:
    """Return how a combine begins for who sends nothing back, and says why."""
    return Give(
        layer=layer.address, item_nbytes=_LEAST_NBYTES, beside_at=NOWHERE, topk=topk, ranks=layer.ranks, is_packed=1,
        status=status,
    )  # fmt: skip


def sum_nothing(layer: GpuLayer, topk: int, deadline: int) -> Sum:
    """Return how a combine ends of which nothing is added up."""
    return Sum(
        layer=layer.address, deadline=deadline, topk=topk, ranks=layer.ranks, item_nbytes=_LEAST_NBYTES,
        beside_at=NOWHERE, waits=1,
    )  # fmt: skip


def arrive_at(layer: GpuLayer, kind: Kind, deadline: int, *, signature: int = 0, loads_count: int = 0) -> Arrive:
    """Return what waits for the lines of an operation and tells the host: the next ticket is that of this one."""
    layer.tickets += 1
    return Arrive(
        layer=layer.address, signature=signature, deadline=deadline, ticket=layer.tickets, kind=kind,
        ranks=layer.ranks, loads_count=loads_count,
    )  # fmt: skip


def nothings(layer: int) -> list[tuple[str, ctypes.Structure]]:
    """Return arguments with which each kernel does nothing in a layer that is masked; there is room behind it."""
    send = Send(layer=layer, ranks=1, topk=1, ids_nbytes=4, row_nbytes=_LEAST_NBYTES)
    take = Take(layer=layer, ranks=1, topk=1, ids_nbytes=4, row_nbytes=_LEAST_NBYTES)
    take.ids_at = take.weights_at = take.token_at = NOWHERE
    give = Give(layer=layer, ranks=1, topk=1, item_nbytes=_LEAST_NBYTES, beside_at=NOWHERE)
    added = Sum(layer=layer, ranks=1, topk=1, item_nbytes=_LEAST_NBYTES, beside_at=NOWHERE)
    order = Order(layer=layer, ranks=1, topk=1, row_nbytes=_LEAST_NBYTES, alignment=1)
    order.offsets = layer + ctypes.sizeof(Layer)
    return [
        ("send", send), ("arrive", Arrive(layer=layer, ranks=1)), ("order", order), ("take", take), ("give", give),
        ("sum", added), ("mask", Mask(layer=layer)),
    ]  # fmt: skip
