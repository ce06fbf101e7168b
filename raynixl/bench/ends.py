"""The ends of a measured transfer: regions of every kind of memory, filled and read for the check of their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raynixl.bench.layout import Bytes, fill
from raynixl.bench.pages import huge_memory, user_memory
from raynixl.bench.spec import VRAM
from raynixl.memory import MemoryKind
from raynixl.region import Region

if TYPE_CHECKING:
    from raynixl.agents import Agent


def make_region(agent: Agent, nbytes: int, *, memory: str, gpu: int = 0, name: str = "") -> Region:
    """Return a region of an arena, of a GPU, or of plain memory, in huge pages where that is asked for."""
    if memory == VRAM:
        return agent.empty(nbytes, kind=VRAM, device=gpu, name=name)
    if memory == "arena":
        return agent.empty(nbytes, name=name)
    return agent.register((huge_memory if memory == "huge" else user_memory)(nbytes), name=name)


def fill_end(region: Region, seed: int) -> None:
    """Fill a region with bytes that differ by position and seed, or clear it with seed 0; they are there on return."""
    if region.kind is MemoryKind.DRAM:
        fill(region.array(), seed)
        return
    from raynixl.bench.gpu import upload

    source = np.empty(region.nbytes, np.uint8)
    fill(source, seed)
    upload(region, source)


def bytes_of(region: Region) -> Bytes:
    """Return the bytes of a region in host memory: a view, or a copy of what a GPU has."""
    if region.kind is MemoryKind.DRAM:
        view: Bytes = region.array()
        return view
    from raynixl.bench.gpu import download

    return download(region)
