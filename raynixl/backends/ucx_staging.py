"""Memory of a GPU that no lane reaches: through pinned buffers, of which UCX moves one while the other is copied.

Only our end is staged: the peer's end is its UCX's, which takes part where no lane reaches it. UCX would stage our end
itself, piece by piece and without overlap, and only where it has a transport that copies memory of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raynixl import cuda
from raynixl.backends.base import Local, Op, Request
from raynixl.backends.nvlink_staging import PIECE_NBYTES, SETTLE_SECONDS, Bounce, Hung, Piece, StagedProgram, Staging
from raynixl.errors import BackendUnavailable
from raynixl.memory import MemoryKind
from raynixl.native import CANCELLED, Job, Program
from raynixl.native.ucx import HOST_MEMORY, Mapping, Rail, RemoteKey

Rows = npt.NDArray[np.uint64]


class MappedBounce(Bounce):
    """Pinned buffers that UCX knows, on each rail."""

    def __init__(self, rails: Sequence[Rail]) -> None:
        super().__init__()
        self.mappings: list[Mapping] = []
        try:
            self.mappings += [rail.map(self.host[0], 2 * PIECE_NBYTES, HOST_MEMORY) for rail in rails]
        except RuntimeError as exc:
            self.close()
            raise BackendUnavailable(
                f"UCX does not map pinned memory: {exc}", hint="raise the limit of locked memory: ulimit -l"
            ) from exc

    def close(self) -> None:
        """Give the memory back; nothing uses it any more."""
        mappings, self.mappings = self.mappings, []
        for mapping in mappings:
            mapping.unmap()
        super().close()


@dataclass(frozen=True, slots=True)
class Legs:
    """What UCX does of a request: rows of (path, our address, the peer's, nbytes), and each path's rail and key."""

    rows: Rows
    paths: Sequence[tuple[int, RemoteKey]]


class UcxStaging:
    """What stages for one agent; it has threads and buffers once something is staged."""

    def __init__(self, local: Local, rails: Callable[[], Sequence[Rail]]) -> None:
        self._staging = Staging(local, lambda: MappedBounce(rails()))

    def program(self, request: Request, legs: Legs) -> StagedProgram:
        """Compile the part of a request whose memory here is a GPU's.

        Raises:
            BackendUnavailable: two GPUs of ours do not reach each other.
        """
        gpus = (region.device for region in request.local if region.kind is MemoryKind.VRAM)
        device, *others = dict.fromkeys(gpus)
        for other in others:
            cuda.enable_peer(device, other)
        return _RmaProgram(self._staging, device, request, legs)

    def close(self, timeout: float) -> None:
        """End what is staged and let go of the buffers; nothing is staged afterwards."""
        self._staging.close(timeout)


class _RmaProgram(StagedProgram):
    """A staged program whose other leg is UCX's."""

    def __init__(self, staging: Staging, device: int, request: Request, legs: Legs) -> None:
        self._is_write = request.op is Op.WRITE
        near, far, nbytes = legs.rows[:, 1], legs.rows[:, 2], legs.rows[:, 3]
        source, target = (near, far) if self._is_write else (far, near)
        table = np.stack([source, target, nbytes], axis=1)
        super().__init__(staging, device, table, request.gates, is_upload=not self._is_write)
        self._legs = legs

    def _in_host(self, rows: Rows, piece: Piece, bounce: Bounce) -> Program:
        assert isinstance(bounce, MappedBounce)
        near, far = (rows[:, 0], rows[:, 1]) if self._is_write else (rows[:, 1], rows[:, 0])
        path = self._legs.rows[piece.row.astype(np.intp), 0]
        ways = [(bounce.mappings[rail], key) for rail, key in self._legs.paths]
        moved = np.ascontiguousarray(np.stack([path, near, far, rows[:, 2]], axis=1))
        local = self.staging.local
        return _Waited(local.native.rma(self._is_write, ways, moved, [], local.config.inline_nbytes))


class _Waited:
    """A program whose run returns once UCX has let go of the buffer: who runs it, a thread of ours, has time."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.nbytes = program.nbytes
        self.count = program.count

    def run(self, timeout: float, out_of_line: bool = False) -> int | Job:
        """Move it all; the code.

        Raises:
            Hung: UCX does not let go of the buffer, which must not be used again.
        """
        job = self._program.run(timeout)
        if isinstance(job, int):
            return job
        if not job.wait(timeout):
            job.cancel(CANCELLED)
        if not job.wait_settled(SETTLE_SECONDS):
            raise Hung("UCX does not end an operation")
        return job.code
