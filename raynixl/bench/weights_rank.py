"""A rank of the weights benchmark: one process with one model of its own, which every way brings weights into."""

from __future__ import annotations

import base64
import time
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from raynixl.agents import Agent
from raynixl.bench.layout import fill
from raynixl.bench.shapes import infos_of, make_module
from raynixl.bench.target import Fields, answer_requests
from raynixl.region import Region
from raynixl.weights import Publication, Subscription, WeightSync, publish, subscribe

if TYPE_CHECKING:
    import torch

NAME, ARENA = "bench", "bench-arena"
STEP_SECONDS = 120.0
_ODD = 0x1E3779B97F4A7C15


class Rank:
    """Does what the measuring side asks: one method for each request, JSON values in and out."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._module: Any = None
        self._agent: Agent | None = None
        self._publication: Publication | None = None
        self._sync: WeightSync | None = None
        self._subscription: Subscription | None = None
        self._arena: Region | None = None

    def ask(self, do: str, **fields: Any) -> Fields:
        """Answer one request."""
        answer: Fields = getattr(self, f"do_{do}")(**fields)
        return answer

    def close(self) -> None:
        """Leave groups and close the agent; idempotent."""
        self._arena = None
        self._stack.close()

    @property
    def agent(self) -> Agent:
        """This rank's agent."""
        assert self._agent is not None
        return self._agent

    @property
    def tensors(self) -> list[Any]:
        """The model's parameters, wherever they lie now."""
        return [parameter.data for parameter in self._module.parameters()]

    def flat_tensors(self) -> list[torch.Tensor]:
        """Return the bytes of every parameter, where they lie."""
        import torch

        return [tensor.view(-1).view(torch.uint8) for tensor in self.tensors]

    def do_model(self, model: str, memory: str) -> Fields:
        """Make this rank's model."""
        self._module = make_module(infos_of(model))
        if memory == "vram":
            self._module.cuda()
        return {}

    def do_fill(self, seed: int) -> Fields:
        """Fill all parameters, each with other bytes; seed 0 clears them."""
        with nullcontext() if self._publication is None else self._publication.updating():
            for number, flat in enumerate(self.flat_tensors()):
                _fill_flat(flat, seed and seed + number)
        return {}

    def do_digest(self) -> Fields:
        """Answer with the digest of all parameters in their order."""
        state = xxhash.xxh3_128()
        for flat in self.flat_tensors():
            state.update(flat.cpu().numpy().data)
        return {"digest": state.hexdigest()}

    # raynixl

    def do_agent(self, name: str) -> Fields:
        """Make an agent; answer with its record."""
        self._agent = self._stack.enter_context(Agent(name))
        return {"record": base64.b64encode(self._agent.record()).decode()}

    def do_meet(self, records: list[str]) -> Fields:
        """Know all other agents."""
        for record in records:
            self.agent.peer(base64.b64decode(record))
        return {}

    def do_publish(self, targets: list[str], topology: str, options: Fields) -> Fields:
        """Publish the model, to be pushed to targets from here."""
        self._publication = self._stack.enter_context(publish(self.agent, NAME, self._module, **options))
        self._sync = WeightSync(
            self.agent, NAME, [self.agent.name], targets, topology=topology, delta="off", timeout=STEP_SECONDS
        )
        return {}

    def do_subscribe(self, install: str) -> Fields:
        """Have the model follow what is pushed."""
        self._subscription = self._stack.enter_context(subscribe(self.agent, NAME, self._module, install=install))
        return {}

    def do_push(self, version: int) -> Fields:
        """Push this rank's weights to all targets."""
        assert self._sync is not None
        report = self._sync.push(version)
        at = time.monotonic()
        report.raise_for_excluded()
        return {"at": at, "flip_ms": report.flip_seconds * 1e3}

    def do_pulled(self, source: str) -> Fields:
        """Answer with the bytes that this rank's agent has read from a peer so far."""
        return {"nbytes": sum(one.nbytes for one in self.agent.statistics().routes if one.peer == source)}

    # torch.distributed over gloo

    def do_join_gloo(self, rank: int, world: int, store: str) -> Fields:
        """Join a process group."""
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        self._stack.callback(dist.destroy_process_group)
        dist.barrier()
        return {}

    def do_gloo(self) -> Fields:
        """Broadcast rank 0's parameters into every other's, all of them under way at once."""
        import torch
        import torch.distributed as dist

        began = time.monotonic()
        works = [dist.broadcast(tensor.view(torch.uint8), 0, async_op=True) for tensor in self.tensors]
        for work in works:
            assert work is not None
            work.wait()
        at = time.monotonic()
        return {"at": at, "flip_ms": (at - began) * 1e3}

    # What a bare transfer reaches

    def do_arena(self, nbytes: int) -> Fields:
        """Make an arena of the model's size."""
        self._arena = self.agent.empty(nbytes, name=ARENA)
        self._arena.array()[:] = 0
        return {}

    def do_fill_arena(self, seed: int) -> Fields:
        """Fill the arena; seed 0 clears it."""
        assert self._arena is not None
        fill(self._arena.array(), seed)
        return {}

    def do_digest_arena(self) -> Fields:
        """Answer with the digest of the arena."""
        assert self._arena is not None
        return {"digest": xxhash.xxh3_128(np.asarray(self._arena.array()).data).hexdigest()}

    def do_transfer(self, source: str) -> Fields:
        """Read the source's arena into this one, as `raynixl bench transfer --op read --memory arena` does."""
        assert self._arena is not None
        self.agent.read(self.agent.peer(source)[ARENA], self._arena).wait(timeout=STEP_SECONDS)
        return {"at": time.monotonic(), "flip_ms": 0.0}


def _fill_flat(flat: torch.Tensor, seed: int) -> None:
    """Fill bytes with what no other seed gives, on the device that they are on; seed 0 clears them."""
    if not flat.is_cuda:
        fill(flat.numpy(), seed)
        return
    import torch

    words = torch.arange(-(-flat.numel() // 8), device=flat.device).mul_(_ODD).add_(seed * _ODD % (1 << 62) + 1)
    flat.copy_(words.view(torch.uint8)[: flat.numel()] if seed else torch.zeros_like(flat))


if __name__ == "__main__":
    answer_requests(Rank())
