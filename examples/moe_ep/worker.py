"""One rank: a Ray actor with its batch, its experts, and a neighbour's state in its keeping."""

from collections.abc import Sequence

import ray
import torch
from model import CHOSEN, EXPERTS, LAYERS, WIDTH, Model
from text import LENGTH, SEQUENCES, draw_batch, load_text
from torch import Tensor
from training import Training, size_of

import raynixl as rx

SECONDS = 30.0  # to wait for others


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
@rx.worker
class ExpertWorker:
    """Learns from its own batch, applies its experts to what all ranks send, writes its state to its neighbour."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.text = load_text()
        self.training: Training | None = None
        self.open: list[rx.ExpertParallel | rx.Group] = []

    def name(self) -> str:
        return rx.agent().name

    def join(self, members: Sequence[str], generation: int, step: int) -> None:
        """Work with these members from now on, beginning with a step. Who is new gets its state from its neighbour."""
        self.leave()
        self.rank = members.index(rx.agent().name)
        self.neighbour = rx.agent().peer(members[(self.rank + 1) % len(members)], timeout=SECONDS)
        self.group = rx.Group(rx.agent(), members, name=f"generation-{generation}", timeout=SECONDS)
        layers = [self._spread_experts(f"experts-{generation}-{layer}") for layer in range(LAYERS)]
        self.open = [*layers, self.group]
        if self.training is None:
            self._begin(Model(1, layers), step)
        for layer, ep in zip(self.training.model.layers, layers, strict=True):
            layer.ep = ep
        self.group.barrier()  # now everybody has its state, and memory for its neighbour's
        self._write_to_neighbour(step)

    def leave(self) -> None:
        """Work with nobody any more."""
        for each in self.open:
            each.close()
        self.open = []

    def step(self, step: int) -> tuple[list[float], list[dict[int, int]]]:
        """Do one step; return this rank's loss, and for each layer how many tokens each expert here has seen."""
        losses = self.training.step(step, [draw_batch(self.text, step, self.rank)], self._add_up)
        self._write_to_neighbour(step + 1)
        return losses, self.training.loads()

    def state(self, step: int) -> dict[str, Tensor]:
        """Return this rank's parameters, with their moments, before a step."""
        return self.training.state(step)

    def _spread_experts(self, name: str) -> rx.ExpertParallel:
        return rx.ExpertParallel(
            self.group, experts=EXPERTS, hidden=WIDTH, topk=CHOSEN, max_tokens=SEQUENCES * LENGTH,
            dtype=torch.float32, name=name, deadline=SECONDS,
        )  # fmt: skip

    def _begin(self, model: Model, step: int) -> None:
        """Set up the state in registered memory, and memory for the neighbour's."""
        shape = (2, 3, size_of(model))
        self.half_nbytes = 4 * 3 * size_of(model)
        self.own, self.kept = (rx.agent().empty(2 * self.half_nbytes, name=name) for name in ("own", "kept"))
        self.training = Training(model, self.own.tensor(torch.float32, shape))
        self.mine = torch.empty(1, self.training.shared)
        self.everybody = torch.empty(len(self.group.members), self.training.shared)
        if step:
            rx.agent().read(self._half(self._neighbours(), step), self._half(self.own, step)).wait(timeout=SECONDS)

    def _add_up(self, gradients: Tensor) -> Tensor:
        self.mine.copy_(gradients)
        self.group.allgather(self.mine, self.everybody)
        return self.everybody.sum(dim=0)

    def _write_to_neighbour(self, step: int) -> None:
        rx.agent().write(self._half(self.own, step), self._half(self._neighbours(), step)).wait(timeout=SECONDS)

    def _neighbours(self) -> rx.RemoteRegion:
        return self.neighbour.region("kept", timeout=SECONDS)

    def _half(self, memory: rx.Region | rx.RemoteRegion, step: int) -> rx.MemorySpan:
        return memory.span(step % 2 * self.half_nbytes, self.half_nbytes)
