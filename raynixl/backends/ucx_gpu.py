"""GPU memory under UCX: what must be there before it is mapped, and why peers may reach it only slowly."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Protocol

from raynixl import cuda
from raynixl.cuda import FABRIC, POSIX_FD, Allocation, Origin
from raynixl.errors import BackendUnavailable
from raynixl.memory import Memory, MemoryKind

logger = logging.getLogger(__name__)

_EXPORTS_FDS_SINCE = (1, 22)


class _Runtime(Protocol):
    @property
    def transports(self) -> Sequence[str]: ...
    @property
    def settings(self) -> str: ...
    @property
    def version(self) -> str: ...
    def enter_cuda(self, context: int) -> None: ...


@contextlib.contextmanager
def ready_to_map(memory: Memory, runtime: _Runtime) -> Iterator[str]:
    """Make all ready for UCX to map memory meanwhile; yields why peers will reach it only slowly, or ''.

    Memory of a GPU is mapped in its CUDA context, and whoever drives UCX then has one, too.

    Raises:
        BackendUnavailable: UCX has no transport for memory of a GPU.
        ConfigError, RangeError: it is no memory of a GPU any more.
    """
    if memory.kind is not MemoryKind.VRAM:
        yield ""
        return
    check_transports(runtime.transports, runtime.settings)
    allocation = cuda.examine(memory.address, memory.nbytes)
    context = cuda.context_for(allocation)
    runtime.enter_cuda(context)
    slow = why_slow(allocation, parse_version(runtime.version))
    if slow:
        logger.warning("%s; peers on this host reach it through host memory, many times slower", slow)
    with cuda.current(context):
        yield slow


def is_staged(kind: MemoryKind, *, is_direct: bool) -> bool:
    """Whether memory of ours goes through buffers: a GPU's that no lane reaches, and that cupy's kernels can copy."""
    return kind is MemoryKind.VRAM and not is_direct and find_spec("cupy") is not None


def check_transports(transports: Sequence[str], settings: str) -> None:
    """Refuse GPU memory where UCX has no way to copy it: it would take its addresses for host memory, and crash.

    `transports` are those of UCX, as 'cuda_copy/cuda'; `settings` names what decides on them.

    Raises:
        BackendUnavailable: says what to set.
    """
    if not any(one.partition("/")[0] == "cuda_copy" for one in transports):
        raise BackendUnavailable(
            f"UCX has no transport for GPU memory under {settings}",
            hint="TLS must name cuda (or cuda_copy), and UCX be one with CUDA: raynixl[cu12] or [cu13]",
        )


def parse_version(text: str) -> tuple[int, int]:
    """Return the first two numbers of UCX's version, as (1, 21); (0, 0) if it says something else."""
    parts = text.split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 and all(one.isdigit() for one in parts[:2]) else (0, 0)


def why_slow(allocation: Allocation, version: tuple[int, int]) -> str:
    """Say why CUDA IPC of that UCX does not reach an allocation, and what to set; '' if it does.

    UCX itself says nothing then, and stages all bytes through host memory: hundreds of times slower on one host.
    """
    if allocation.origin is Origin.MALLOC or allocation.handle_types & FABRIC:
        return ""
    if version >= _EXPORTS_FDS_SINCE and allocation.origin is Origin.VIRTUAL and allocation.handle_types & POSIX_FD:
        return ""
    return (
        f"GPU memory made by {allocation.origin.value} is not exported by UCX {version[0]}.{version[1]}: "
        f"{allocation.origin.remedy}"
    )
