"""What peers need to reach memory of a GPU: the key of a region, or why it has none and what to set."""

from __future__ import annotations

import functools
import os
import secrets

from raynixl import cuda
from raynixl.cuda import FABRIC, Allocation, Origin
from raynixl.errors import BackendUnavailable, ConfigError
from raynixl.memory import Memory

Key = dict[str, str | int]

MOST_CHUNKS = 16
"""Pieces of virtual memory that a key names; each takes 128 letters of a record."""


def export(memory: Memory) -> Key:
    """Return the key of memory on a GPU; it holds for as long as the memory is not freed.

    `uuid` is the GPU; `process` this process among all that were and will be, and `buffer` the number of the
    allocation, which a process never gives twice: memory that was freed and made anew may have the handle that it had
    before. `handle` opens the whole allocation, which begins `offset` before the memory and is of `size`. With `fabric`
    there are several handles, and `chunks` are their sizes. Memory that no other process can map is exported with a
    `refusal`: this process reaches it all the same.

    Raises:
        ConfigError, RangeError: it is no memory of a GPU any more.
    """
    allocation = cuda.examine(memory.address, memory.nbytes)
    seen = cuda.devices()
    key: Key = {
        "uuid": seen[allocation.device].uuid, "process": _name_of(os.getpid()), "buffer": allocation.buffer_id,
    }  # fmt: skip
    refusal = why_not_exported(allocation)
    if refusal:
        return {**key, "refusal": refusal}
    try:
        with cuda.current(cuda.context_for(allocation)):
            return {**key, **_handles(memory, allocation)}
    except (BackendUnavailable, ConfigError) as exc:
        return {**key, "refusal": f"{exc.message}; {exc.hint}; or {allocation.origin.remedy}"}


def why_not_exported(allocation: Allocation) -> str:
    """Say why no other process can map an allocation, and what to set; '' if it can."""
    if allocation.origin is Origin.MALLOC and allocation.is_ipc_capable:
        return ""
    if allocation.origin is Origin.VIRTUAL and allocation.handle_types & FABRIC:
        return ""
    return (
        f"GPU memory made by {allocation.origin.value} cannot be mapped by other processes: {allocation.origin.remedy}"
    )


@functools.cache
def _name_of(pid: int) -> str:
    return secrets.token_hex(8)  # a forked child has another one


def _handles(memory: Memory, allocation: Allocation) -> Key:
    if allocation.origin is Origin.MALLOC:
        return {
            "handle": cuda.ipc_export(allocation.start).hex(),
            "offset": memory.address - allocation.start, "size": allocation.nbytes,
        }  # fmt: skip
    chunks = cuda.export_chunks(memory.address, memory.nbytes, most=MOST_CHUNKS)
    return {
        "fabric": "".join(chunk.handle.hex() for chunk in chunks),
        "chunks": ",".join(str(chunk.nbytes) for chunk in chunks),
        "offset": memory.address - chunks[0].address, "size": sum(chunk.nbytes for chunk in chunks),
    }  # fmt: skip
