"""Members: how the ranks of a DeepEP buffer find each other, over what their users group them by."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raynixl.collectives import Group
from raynixl.errors import ConfigError

if TYPE_CHECKING:
    from raynixl.agents import Agent


@dataclass(frozen=True, slots=True)
class Members:
    """The ranks of a buffer; those of our own making are closed with it."""

    group: Group
    owned: tuple[Any, ...]

    @property
    def rank(self) -> int:
        """Our rank."""
        return self.group.rank

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return self.group.world

    def gather(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the values of all ranks, by rank; all call this, with as many each."""
        out = np.empty((self.world, *values.shape), values.dtype)
        self.group.allgather(np.ascontiguousarray(values), out)
        return out

    def close(self) -> None:
        """Close what was made for these members; idempotent."""
        for one in self.owned:
            one.close()


def join(group: Any, comm: Any, agent: Agent | None) -> Members:
    """Return the members that a group stands for: a raynixl group, one of torch.distributed, or MPI's communicator.

    With the last two agents exchange their records over it, once; an agent is made where none is given.

    Raises:
        ConfigError: it is none of these.
        ValueError: there is neither group nor comm, as DeepEP says it.
    """
    if isinstance(group, Group):
        return Members(group, ())
    if group is None and comm is None:
        raise ValueError("Either 'group' or 'comm' must be provided.")
    rank, world, gather = _torch_group(group) if group is not None else _mpi(comm)
    return _introduce(rank, world, gather, agent)


def _introduce(rank: int, world: int, gather: Callable[[Any], list[Any]], agent: Agent | None) -> Members:
    from raynixl.agents import Agent
    from raynixl.config import from_env

    common = gather(secrets.token_hex(4))[0]
    ours = Agent(f"deep_ep-{common}-{rank}", config=from_env()) if agent is None else agent
    owned: tuple[Any, ...] = () if agent is not None else (ours,)
    try:
        met = gather((ours.name, ours.record()))
        names = [name for name, _ in met]
        for name, record in met:
            if name != ours.name:
                ours.peer(record)
        group = Group(ours, names, name=f"deep_ep-{common}")
    except BaseException:
        for one in owned:
            one.close()
        raise
    assert (group.rank, group.world) == (rank, world)
    return Members(group, (group, *owned))


def _torch_group(group: Any) -> tuple[int, int, Callable[[Any], list[Any]]]:
    if not callable(getattr(group, "rank", None)) or not callable(getattr(group, "size", None)):
        raise ConfigError(
            f"{type(group).__name__} is no group", hint="give a raynixl.Group, a torch.distributed group, or comm=",
        )  # fmt: skip
    import torch.distributed as dist

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * group.size()
        dist.all_gather_object(values, value, group)
        return values

    return group.rank(), group.size(), gather


def _mpi(comm: Any) -> tuple[int, int, Callable[[Any], list[Any]]]:
    return comm.Get_rank(), comm.Get_size(), lambda value: list(comm.allgather(value))
