"""The interface of the part of the core that speaks UCX: rails, mappings, endpoints, and one-sided operations.

Handles of UCX and addresses of memory are plain integers; whoever gives them answers for them. What leaves the
memory of its path is refused when a program is made, so that nothing outside it is ever posted: UCX checks nothing.
Both cores find libucp in the process, where `ucxx` has loaded it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from raynixl.native import Gate, Program

HOST_MEMORY: Final = 0
CUDA_MEMORY: Final = 1


class Mapping(Protocol):
    """Memory of ours that UCX may read and write on one rail."""

    @property
    def key(self) -> bytes:
        """What a peer needs to reach it, in UCX's own form. RuntimeError: UCX packs none."""

    def unmap(self) -> None:
        """Let UCX forget it; nothing may use it any more. Idempotent."""


class RemoteKey(Protocol):
    """A span of a peer's memory, reachable over one endpoint."""

    def destroy(self) -> None:
        """Let go of it; nothing may use it any more. Idempotent."""


class Endpoint(Protocol):
    """One UCX endpoint to one peer, with peer error handling. Lives until it has been closed."""

    @property
    def code(self) -> int:
        """What it was closed with; 0 while it is open."""

    @property
    def status(self) -> str:
        """What UCX said when the peer or the way to it failed, or ''. Whoever reads it closes the endpoint."""

    @property
    def is_gone(self) -> bool:
        """Whether it has been closed and UCX has let go of it."""

    @property
    def transports(self) -> list[str]:
        """What UCX has chosen to carry it, as transport/device: 'tcp/eth0', 'cma/memory'. Empty once closed."""

    def unpack(self, key: bytes, address: int, nbytes: int) -> RemoteKey:
        """Take the key of a peer's mapping, and the range that it stands for. RuntimeError: UCX does not take it."""

    def limit_reads(self, nbytes: int) -> None:
        """Let one read be under way at a time, of so many bytes at most, in all programs made from now on.

        For endpoints where UCX emulates reads: if the reader dies, UCX 1.19 to 1.21 crash the target over answers that
        do not fit into the buffer of its socket, and over a second read.
        """

    def close(self, code: int) -> None:
        """Refuse later operations with `code` and end those in flight by force. Does not wait; the first code stays."""


class Rail(Protocol):
    """One worker of UCX. Its bell (an eventfd) rings when an endpoint has failed or jobs need to be looked after."""

    @property
    def address(self) -> bytes:
        """What a peer needs to make an endpoint to it. RuntimeError: UCX gives none."""

    def map(self, address: int, nbytes: int, memory_type: int) -> Mapping:
        """Make memory reachable. RuntimeError: UCX does not map it."""

    def connect(self, address: bytes) -> Endpoint:
        """Make an endpoint to a peer's worker; does not wait for the peer. RuntimeError: no transport reaches it."""

    def serve(self) -> bool:
        """Serve peers and what was handed over on a thread of the core's own, until `release`.

        False: this core has none, and a progress thread of ucxx must do it.
        """

    def sweep(self, grace: float) -> bool:
        """Look after the jobs that were handed over: apply deadlines and closed gates, and reset the endpoints of those
        that ended more than `grace` seconds ago and that UCX has not let go of. To be called now and then after the
        bell, until it says False.
        """

    def close(self, timeout: float) -> bool:
        """Run nothing more and close every endpoint; True once UCX has let go of all.

        Keys and mappings can still be given back, until `release`.
        """

    def release(self) -> None:
        """Touch the worker no more: it is about to be destroyed."""


class RailMaker(Protocol):
    """The class `Rail` of an implementation."""

    def __call__(self, context: int, worker: int, bell: int) -> Rail:
        """Use a context and a worker of UCX by their handles; `bell` is duplicated."""


class MakeRma(Protocol):
    """The function `rma` of an implementation."""

    def __call__(
        self,
        is_write: bool,
        paths: Sequence[tuple[Mapping, RemoteKey]],
        rows: npt.NDArray[np.uint64],
        gates: Sequence[Gate],
        inline_nbytes: int,
    ) -> Program:
        """Compile rows of (path, our address, the peer's address, nbytes) into a program like those of an engine.

        A run returns CLOSED after its rail was closed, and LOST after its endpoint was: a new one is to be made.

        A job of it cannot be stopped piece by piece: one that is cancelled or late ends at once for whoever looks, but
        is settled only when UCX has let go of the memory, which `Rail.sweep` enforces.

        Raises:
            ValueError: no rows, a row of 0 bytes, without a path, or outside the memory of its path.
            TypeError: not a C-contiguous (N, 4) array of uint64, or something else than paths and gates.
        """
