"""Actors for the tests of Ray Direct Transport; workers import this file too."""

from __future__ import annotations

import os
from typing import Any

import ray
import torch

import raynixl as rx
from raynixl.integrations import ray_rdt
from raynixl.integrations.rdt_transport import transport

ray_rdt.register()

ROWS, COLUMNS = 512, 1024


def made(seed: int = 1) -> list[torch.Tensor]:
    """Tensors of many kinds; several lie in the same storage."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(ROWS, COLUMNS, generator=generator)
    grid = torch.randint(0, 100, (4, 6, 8), generator=generator)
    return [
        w, w[10:20], w[:, 3], w.t()[5:7], w[::2, ::256], grid[:, 1:3, ::2], torch.zeros(0), torch.tensor(7),
        w.to(torch.bfloat16), w > 0, grid[1].expand(3, 6, 8), torch.complex(w[:2], w[2:4]).conj(),
    ]  # fmt: skip


def bits(tensors: list[torch.Tensor]) -> list[Any]:
    """What can be compared, bit by bit, and sent."""
    plain = [tensor.detach().resolve_conj().contiguous() for tensor in tensors]
    return [
        (str(one.dtype), tuple(one.shape), one.reshape(-1).view(torch.uint8).numpy().tobytes() if one.numel() else b"")
        for one in plain
    ]


class Worker:
    """Gives and takes tensors."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.holder: Any = None

    @ray.method(tensor_transport="raynixl")
    def give(self, seed: int = 1) -> list[torch.Tensor]:
        """Give tensors of many kinds."""
        return made(seed)

    @ray.method(tensor_transport="raynixl")
    def give_big(self) -> list[torch.Tensor]:
        """Give 4 MiB."""
        return [torch.arange(1 << 20, dtype=torch.int32)]

    @ray.method(tensor_transport="raynixl")
    def fail(self) -> list[torch.Tensor]:
        """Give nothing."""
        raise KeyError("nothing to give")

    def put(self) -> list[Any]:
        """Give a reference in a list."""
        return [ray.put(made(), _tensor_transport="raynixl")]

    def take(self, tensors: list[torch.Tensor]) -> list[Any]:
        """Take tensors as an argument."""
        return bits(tensors)

    def get(self, refs: list[Any]) -> list[Any]:
        """Take tensors by a reference."""
        return bits(ray.get(refs[0]))

    def get_many(self, other: Any, count: int) -> int:
        """Take many, one after the other; return how many Ray remembers."""
        for _ in range(count):
            ray.get(ray.get(other.put.remote())[0])
        return len(ray._private.worker.global_worker.rdt_manager._managed_rdt_metadata)

    def hold(self, refs: list[Any]) -> bool:
        """Take tensors by a reference and give them to others, too."""
        self.tensors = ray.get(refs[0])
        self.holder = ray_rdt.hold(refs[0], self.tensors)
        return True

    def let_go(self) -> None:
        """Give them no more."""
        self.holder.close()
        self.tensors = []

    def held(self) -> tuple[int, int]:
        """How many storages are registered, and how many objects Ray keeps."""
        store = ray._private.worker.global_worker.rdt_manager.rdt_store
        return len(transport().desk().shelf), store.get_num_objects()

    def read_from(self) -> dict[str, int]:
        """How many bytes came from whom."""
        found: dict[str, int] = {}
        for route in rx.agent().statistics().routes:
            found[route.peer] = found.get(route.peer, 0) + route.nbytes
        return found

    def name(self) -> str:
        """The agent's name."""
        return rx.agent().name

    def pid(self) -> int:
        """The process."""
        return os.getpid()

    def exit(self) -> None:
        """Die."""
        os._exit(1)


Actor = ray.remote(num_cpus=0)(Worker)


@ray.remote(num_cpus=0)
class AsyncTaker:
    """Awaits references."""

    async def take(self, other: Any) -> list[Any]:
        """Await the result of another actor."""
        return bits(await other.give.remote(3))
