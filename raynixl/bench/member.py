"""A member of the broadcast benchmark: one rank in a process of its own, with a buffer of its own."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np

from raynixl.agents import Agent
from raynixl.bench.layout import digest, fill
from raynixl.bench.pages import user_memory
from raynixl.bench.target import Fields, answer_requests
from raynixl.collectives import Group

STEP_SECONDS = 60.0


class Member:
    """Does what the measuring side asks: one method for each request, JSON values in and out."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)
        self._agent: Agent | None = None
        self._group: Group | None = None
        self._tensor: Any = None

    def ask(self, do: str, **fields: Any) -> Fields:
        """Answer one request."""
        answer: Fields = getattr(self, f"do_{do}")(**fields)
        return answer

    def close(self) -> None:
        """Leave groups and close the agent; idempotent."""
        if self._group is not None:
            self._group.close()
        if self._agent is not None:
            self._agent.close()
        if self._tensor is not None:
            import torch.distributed

            torch.distributed.destroy_process_group()
            self._tensor = None

    def do_buffer(self, nbytes: int) -> Fields:
        """Make this rank's buffer: plain touched memory."""
        self._buffer = user_memory(nbytes)
        return {}

    def do_fill(self, seed: int) -> Fields:
        """Fill the buffer; seed 0 clears it."""
        self._buffer[:] = 0
        if seed:
            fill(self._buffer, seed)
        return {}

    def do_digest(self) -> Fields:
        """Answer with the digest of the buffer."""
        return {"digest": digest(self._buffer)}

    def do_agent(self, name: str) -> Fields:
        """Make an agent; answer with its record."""
        self._agent = Agent(name)
        return {"record": base64.b64encode(self._agent.record()).decode()}

    def do_join(self, members: list[str], records: list[str]) -> Fields:
        """Join the group of all members."""
        assert self._agent is not None
        for record in records:
            self._agent.peer(base64.b64decode(record))
        self._group = Group(self._agent, members, name="bench", timeout=STEP_SECONDS)
        self._group.barrier()
        return {}

    def do_raynixl(self) -> Fields:
        """Broadcast rank 0's buffer into every other's."""
        assert self._group is not None
        self._group.broadcast(self._buffer)
        return {"at": time.monotonic()}

    def do_join_gloo(self, rank: int, world: int, store: str) -> Fields:
        """Join a process group of torch.distributed over gloo."""
        import torch
        import torch.distributed

        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        self._tensor = torch.from_numpy(self._buffer)
        torch.distributed.barrier()
        return {}

    def do_gloo(self) -> Fields:
        """Broadcast rank 0's buffer into every other's, by gloo."""
        import torch.distributed

        torch.distributed.broadcast(self._tensor, 0)
        return {"at": time.monotonic()}


if __name__ == "__main__":
    answer_requests(Member())
