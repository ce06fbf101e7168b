"""The copy engine's interface, and the choice between its two implementations: compiled, and ctypes.

Addresses are plain integers: whoever makes a program answers for the memory behind them. Gates say when that
memory goes away. Every method may be called from any thread; those that block release the GIL.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, runtime_checkable

from raynixl.native.codes import (
    CANCELLED,
    CLOSED,
    COPY,
    DONE,
    LOST,
    PENDING,
    RESET,
    STALE,
    TIMEOUT,
    VM_READ,
    VM_WRITE,
)
from raynixl.native.moe import MoeCore
from raynixl.native.ucx import MakeRma, RailMaker

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "CANCELLED",
    "CLOSED",
    "COPY",
    "DONE",
    "INLINE_NBYTES",
    "LOST",
    "PENDING",
    "RESET",
    "STALE",
    "TIMEOUT",
    "VM_READ",
    "VM_WRITE",
    "Digesting",
    "DigestingJob",
    "Engine",
    "Gate",
    "Job",
    "Launcher",
    "Native",
    "Program",
    "load",
]

INLINE_NBYTES: Final = 1 << 20

_log = logging.getLogger(__name__)


class Gate(Protocol):
    """The door through which every operation enters a region's memory."""

    def close(self, code: int, *, abort: bool = True) -> None:
        """Refuse every later entry with `code`, 2 or more; the first code stays.

        Those inside stop soon if `abort`, else they finish; a later close may still abort them.
        """

    def drain(self, timeout: float) -> bool:
        """Wait until nobody is inside; False at the timeout."""

    @property
    def code(self) -> int:
        """The code it was closed with; 0 while it is open."""

    def enter(self) -> int:
        """Count the caller in; return 0, or the code that refuses it. For what is carried out outside of the core."""

    def leave(self) -> None:
        """Count out a caller who had been counted in."""

    @property
    def aborted(self) -> int:
        """The code if those inside are to stop, else 0."""

    @property
    def inflight(self) -> int:
        """How many operations are inside."""


class Job(Protocol):
    """One run of a program by the engine's threads. Dropping it changes nothing: it goes on to its end."""

    @property
    def code(self) -> int:
        """PENDING until it has ended. Looking applies the deadline: past it, the job ends with TIMEOUT."""

    @property
    def nbytes_done(self) -> int:
        """Bytes of the pieces that are complete."""

    @property
    def settled(self) -> bool:
        """Whether it has ended and no thread copies for it any more: its gates have been left."""

    def wait(self, timeout: float) -> bool:
        """Wait for the end, copying meanwhile if a participant's place is free. False at the timeout."""

    def wait_settled(self, timeout: float) -> bool:
        """Wait until no thread copies for it any more. False at the timeout."""

    def cancel(self, code: int) -> bool:
        """End it with `code`, 2 or more, unless it has ended. Threads inside stop at their next piece."""

    def arm(self, fd: int) -> bool:
        """Have 1 written to an eventfd when it ends; False if it has. The descriptor is duplicated.

        Raises:
            OSError: the descriptor is not open, or no more can be.
        """


class Program(Protocol):
    """A list of segments, resolved once and run many times, also while an earlier run is in flight."""

    @property
    def nbytes(self) -> int:
        """Bytes that one run moves."""

    @property
    def count(self) -> int:
        """Segments."""

    def run(self, timeout: float, out_of_line: bool = False) -> int | Job:
        """Enter all gates, then copy here if it is small, else hand a job to the engine's threads.

        Returns at once: the code of a gate that refused (nothing was copied), DONE, -errno, or a `Job`.
        """


@runtime_checkable
class DigestingJob(Job, Protocol):
    """A job that may digest what it copies."""

    @property
    def digest(self) -> tuple[int, int] | None:
        """The digest of all that it has copied, once it is done; None if it makes none."""


@runtime_checkable
class Digesting(Protocol):
    """What programs of the engine can besides: digest in the same pass what they copy."""

    def run_digesting(self, timeout: float, shift: int, seed: int) -> int | DigestingJob:
        """Run as a job; bytes that go to address a are digested at the position (a + shift) modulo 2^64.

        Only programs of mode COPY digest. Returns as `run` does.
        """


class Engine(Protocol):
    """A few threads that copy; started by the first job that needs them, asleep while there is none."""

    @property
    def threads(self) -> int:
        """How many threads may work on one job, a waiting caller included."""

    def program(self, mode: int, pid: int, segments: npt.NDArray[np.uint64], gates: Sequence[Gate]) -> Program:
        """Compile rows of (source address, destination address, nbytes), which are copied.

        Raises:
            ValueError: no rows, a row of 0 bytes or past the end of memory, or an unknown mode.
            TypeError: not a C-contiguous (N, 3) array of uint64, or something else than gates.
        """

    def close(self, timeout: float) -> bool:
        """End all jobs with CLOSED and join the threads. Idempotent; False if not all went in time."""


class EngineMaker(Protocol):
    """The class `Engine` of an implementation."""

    def __call__(self, threads: int, inline_nbytes: int = INLINE_NBYTES) -> Engine:
        """Make an engine that copies up to `inline_nbytes` in the caller's own thread."""


class Launcher(Protocol):
    """A kernel of a GPU, packed once; what it copies before, if anything, goes by the GPU's copy engines."""

    def run(self, stream: int, flag: int, number: int, counter: int, may_wait: bool) -> int:
        """Put it on a stream, with these numbers as its last arguments; return the driver's error, or 0.

        The interpreter's lock is released if it `may_wait`, which it does when too much is on the stream already.
        """


class LauncherMaker(Protocol):
    """The class `Launcher` of an implementation."""

    def __call__(
        self,
        functions: tuple[int, int, int, int, int],
        context: int,
        function: int,
        shape: tuple[int, int],
        values: npt.NDArray[np.uint64],
        copies: npt.NDArray[np.uint64],
    ) -> Launcher:
        """Pack a kernel of a context: `shape` is its CTAs and their threads, `values` its arguments but the last three.

        `functions` are, by address, cuCtxGetCurrent, cuCtxPushCurrent, cuCtxPopCurrent, cuLaunchKernel and
        cuMemcpyAsync. `copies` are rows of (source, destination, nbytes).
        """


_MakeGate: TypeAlias = Callable[[], Gate]  # inside Native, `Gate` would name its own member


class Native(MoeCore, Protocol):
    """What both implementations offer: `raynixl._native` and `raynixl.native.twin`."""

    @property
    def NAME(self) -> str:  # noqa: N802 - a module's constant
        """'native' or 'ctypes'."""

    @property
    def Gate(self) -> _MakeGate:  # noqa: N802 - a class
        """Make an open gate."""

    @property
    def Engine(self) -> EngineMaker:  # noqa: N802 - a class
        """Make an engine."""

    @property
    def Launcher(self) -> LauncherMaker:  # noqa: N802 - a class
        """Pack a kernel of a GPU."""

    @property
    def Rail(self) -> RailMaker:  # noqa: N802 - a class
        """Use a worker of UCX; see raynixl.native.ucx."""

    @property
    def rma(self) -> MakeRma:
        """Make a program of one-sided operations over UCX; see raynixl.native.ucx."""

    def enter_cuda(self, context: int, get_current: int, set_current: int) -> None:
        """Have every thread that drives UCX from now on do so in a CUDA context, unless it has one of its own.

        The functions are those of the driver, by address. Once for the process: the first call counts.
        """

    def copy(self, dst_addr: int, src_addr: int, nbytes: int) -> None:
        """Copy between two ranges of this process, GIL released."""

    def look_for(self, address: int, value: int, timeout: float) -> bool:
        """Look at an aligned word of 8 bytes until it is `value` or more, without sleeping, GIL released.

        False at the timeout, in seconds. For what others than threads write, such as a GPU.
        """

    def mapped(self, address: int, nbytes: int) -> bool:
        """Whether every page of the range is mapped in this process (readable or not)."""

    def digest_rows(self, rows: npt.NDArray[np.uint64], out: npt.NDArray[np.uint64], seed: int) -> None:
        """Add the digest of each row of (address, nbytes, position, index) to `out[index]`, GIL released.

        `out` is (M, 2), and no other thread may use it meanwhile. native/digest.h says what a digest is.

        Raises:
            ValueError: an index of no sum, or a row past the end of memory or of all positions; nothing was read.
            TypeError: not C-contiguous arrays of uint64 of these forms, or a seed that is not.
        """

    def digest_copy(self, rows: npt.NDArray[np.uint64], out: npt.NDArray[np.uint64], seed: int) -> None:
        """Copy rows of (source, destination, nbytes, position, index), and digest them in the same pass, GIL released.

        For memory that is not in a cache, and need not be afterwards. Arguments and errors are as of `digest_rows`.
        """

    def delta_encode(self, rows: npt.NDArray[np.uint64], itemsize: int, limit: int) -> tuple[bytes, bytes] | None:
        """Find the elements that differ between two copies: rows of (before, after, nbytes, position), GIL released.

        Returns the gaps between them and their values after (native/delta.h), or None beyond `limit` bytes.

        Raises:
            ValueError: rows that do not ascend in position, overlap or are not whole items; nothing was read.
            TypeError: not a C-contiguous (N, 4) array of uint64.
        """

    def delta_apply(
        self,
        gaps: npt.NDArray[np.uint8],
        values: npt.NDArray[np.uint8],
        itemsize: int,
        arenas: npt.NDArray[np.uint64],
        *,
        write: bool,
    ) -> bool:
        """Check that all elements lie in arenas of (address, nbytes), and write them if wanted, GIL released.

        False if one does not, or the gaps are malformed: then check before you write, or some may be written.

        Raises:
            ValueError: the values are not whole items.
            TypeError: not C-contiguous arrays of these types.
        """


def load(native: bool) -> Native:
    """Return the compiled core if it is wanted and was built, else its ctypes twin."""
    if native:
        try:
            from raynixl import _native
        except ImportError as exc:
            _log.info("no compiled core (%s): its ctypes twin runs instead", exc)
        else:
            return _native
    from raynixl.native import twin

    return twin
