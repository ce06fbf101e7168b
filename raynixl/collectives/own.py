"""A member's own part: what it copies from one of its buffers into the other, in the host's memory or on GPUs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from raynixl.backends.base import CopiesHere
from raynixl.errors import AgentClosed, BackendUnavailable, RaynixlError, RegionReadOnly, RegionStale, TransferTimeout
from raynixl.memory import MemoryKind
from raynixl.native import CLOSED, DONE, STALE, TIMEOUT, Program
from raynixl.region import Region

if TYPE_CHECKING:
    from raynixl.agents import Agent


def copy_own(agent: Agent, source: Region, out: Region, piece: tuple[int, int, int], timeout: float) -> None:
    """Copy a piece of (offset in source, offset in out, nbytes); what lies there already stays as it is.

    Raises:
        RegionReadOnly: `out` cannot be written.
        BackendUnavailable: one of them is on a GPU, and no backend of the agent copies there.
        TransferTimeout: a GPU is not through in time.
        RegionStale, AgentClosed: one of them was deregistered meanwhile, or the agent closed.
    """
    if not out.memory.writable:
        raise RegionReadOnly("the buffer of a group's operation cannot be written", hint="give writable memory")
    source_offset, offset, nbytes = piece
    if source.memory.address + source_offset == out.memory.address + offset:
        return
    if source.kind is MemoryKind.DRAM and out.kind is MemoryKind.DRAM:
        out.array()[offset : offset + nbytes] = source.array()[source_offset : source_offset + nbytes]
        return
    backend = next((one for one in agent.backends if isinstance(one, CopiesHere)), None)
    if backend is None:
        raise BackendUnavailable(
            f"no backend of {agent.name!r} copies between {source.kind.value} and {out.kind.value} of its own",
            hint="name nvlink in AgentConfig(backends=...)",
        )
    for program in backend.copy(source, out, np.array([piece], np.uint64)):
        _run(program, timeout)


def _run(program: Program, timeout: float) -> None:
    """Run a program to its end."""
    result = program.run(timeout)
    if not isinstance(result, int):
        result.wait(timeout)
        result = result.code
    if result != DONE:
        raise _error(result, timeout)


def _error(code: int, timeout: float) -> RaynixlError:
    if code == TIMEOUT:
        return TransferTimeout(f"a GPU did not copy a member's own part within {timeout:g} s", hint="see nvidia-smi")
    if code == CLOSED:
        return AgentClosed("the agent was closed while a member's own part was copied", hint="make a new one")
    if code == STALE:
        return RegionStale("a buffer of a group's operation was deregistered meanwhile")
    why = os.strerror(-code) if code < 0 else f"code {code}"
    return BackendUnavailable(f"a member's own part was not copied: {why}", hint="see the log, and nvidia-smi")
