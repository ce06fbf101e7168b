"""Spaces: the memories that weights lie in, the host's or a GPU's, and which of them a model's arenas are to lie in."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raynixl.errors import ConfigError
from raynixl.memory import MemoryKind

if TYPE_CHECKING:
    import torch

    from raynixl.agents import Agent
    from raynixl.region import Region

_GPU = "cuda"


@dataclass(frozen=True, slots=True)
class Space:
    """The memory of one device, by torch's name for it."""

    name: str = "cpu"
    is_pinned: bool = field(default=False, compare=False)
    """Whether arenas in host memory are to be pinned, as what lies in them comes from a GPU or goes to one."""
    near: int = field(default=0, compare=False)
    """The number of such a GPU: pinning makes a context on no other."""

    @property
    def is_host(self) -> bool:
        """Whether it is the host's."""
        return self.name == "cpu"

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU's, in which an agent can have memory."""
        return self.name.partition(":")[0] == _GPU

    @property
    def number(self) -> int:
        """The device's number."""
        return int(self.name.partition(":")[2] or 0)

    def empty(self, agent: Agent, nbytes: int, *, name: str = "") -> Region:
        """Return registered memory there, all zeros.

        Raises:
            RangeError: there is too little.
            BackendUnavailable: no backend of the agent takes such memory.
            ConfigError: the name is taken.
        """
        if self.is_host:
            return agent.empty(nbytes, name=name)
        return agent.empty(nbytes, kind=MemoryKind.VRAM.value, device=self.number, name=name)


HOST = Space()


def device_of(tensor: torch.Tensor) -> str:
    """Return the device that a tensor is on. Tests without a GPU put something else here."""
    return _name(tensor.device)


@functools.cache
def _name(device: torch.device) -> str:
    return str(device)


def space_of(tensor: torch.Tensor) -> Space:
    """Return the memory that a tensor lies in."""
    return _space(device_of(tensor))


@functools.cache
def _space(name: str) -> Space:
    return Space(name)


def gpus_of(tensors: Iterable[torch.Tensor]) -> set[Space]:
    """Return the GPUs that tensors lie on."""
    return {space for space in set(map(space_of, tensors)) if space.is_gpu}


def spaces_for(tensors: Iterable[torch.Tensor], memory: str) -> tuple[Space, ...]:
    """Return where arenas for tensors are to lie: the first of these spaces that has room.

    'auto' is the GPU that most of their bytes are on, then the host; 'dram' the host, 'vram' the GPU alone. Where
    several GPUs hold parts of one model, none is taken to have room for all of it.

    Raises:
        ConfigError: it is none of these, or 'vram' for tensors that are not on one GPU.
    """
    if memory not in ("auto", MemoryKind.DRAM.value, MemoryKind.VRAM.value):
        raise ConfigError(f"memory={memory!r:.40} is not known", hint="use 'auto', 'dram' or 'vram'")
    nbytes: Counter[Space] = Counter()
    for tensor in tensors:
        nbytes[space_of(tensor)] += tensor.numel() * tensor.element_size()
    gpus = [space for space in nbytes if space.is_gpu]
    has_one = len(gpus) == 1
    if memory == MemoryKind.VRAM.value:
        if not has_one:
            raise ConfigError(f"memory='vram' for tensors on {len(gpus)} GPUs", hint="use memory='dram' or 'auto'")
        return (gpus[0],)
    host = Space(is_pinned=bool(gpus), near=min((space.number for space in gpus), default=0))
    if memory == MemoryKind.DRAM.value or not has_one or 2 * nbytes[gpus[0]] < nbytes.total():
        return (host,)
    return gpus[0], host
