"""Made-up GPUs for tests of agents, and memory on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cuda_fake
import cuda_kernels
import numpy as np
from agent_tools import make_agent, random_bytes

from raynixl import Agent, Region
from raynixl.backends.base import Local
from raynixl.backends.nvlink import NvlinkBackend
from raynixl.testing.contents import get, put

BACKENDS = ("loopback", "shm", "nvlink")


@contextmanager
def made_up_gpus(**settings: Any) -> Iterator[Any]:
    """A made-up driver in this process, which fails the test for every misuse and leak."""
    fake = cuda_fake.install(**settings)
    cuda_kernels.register(fake)
    try:
        yield fake
    finally:
        fake.release()
        fake.finish()


class FakedNvlink(NvlinkBackend):
    """nvlink that brings a made-up driver along, where a check starts a process of its own."""

    def __init__(self, local: Local) -> None:
        from raynixl import cuda

        if not cuda.has_driver():
            cuda_kernels.register(cuda_fake.install())
        super().__init__(local)


class Piece:
    """Part of a region's memory, as an array of another library would show it."""

    def __init__(self, region: Region, offset: int, nbytes: int, *, writable: bool = True) -> None:
        self.region = region
        self.__cuda_array_interface__ = {
            "version": 3, "typestr": "|u1", "shape": (nbytes,),
            "data": (region.memory.address + offset, not writable), "stream": None,
        }  # fmt: skip


def gpu_agent(name: str, **settings: Any) -> Agent:
    """An agent for tests that has nvlink."""
    return make_agent(name, **({"backends": BACKENDS} | settings))


def make_region(agent: Agent, sort: str, nbytes: int, *, seed: int = 0, name: str = "", device: int = 0) -> Region:
    """A region of a sort: 'vram', 'arena' or 'user'; random bytes of a seed, or zeros."""
    if sort == "user":
        region = agent.register(np.empty(nbytes, np.uint8), name=name)
    else:
        region = agent.empty(nbytes, kind="vram" if sort == "vram" else "dram", device=device, name=name)
    put(region.memory, random_bytes(nbytes, seed) if seed else np.zeros(nbytes, np.uint8))
    return region


def content(region: Region) -> np.ndarray:
    """The bytes of a region."""
    return get(region.memory)


def move(source: np.ndarray, target: np.ndarray, table: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Do in host memory what a transfer of blocks (from, to, length) does."""
    for start, to, length in zip(*table, strict=True):
        target[to : to + length] = source[start : start + length]


def some_blocks(nbytes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks that begin and end anywhere, shuffled, none overlapping: (from, to, length)."""
    draw, cell = np.random.default_rng(seed), 1024
    cells = draw.permutation(nbytes // cell)
    lengths = draw.integers(1, 700, len(cells))
    starts = np.arange(len(cells)) * cell + draw.integers(0, 300, len(cells))
    return starts, cells * cell + draw.integers(0, 300, len(cells)), lengths
