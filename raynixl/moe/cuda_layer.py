"""Layers on a GPU: what the kernels of one `ExpertParallel` keep there and share with the host, and their launches."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from raynixl import cuda
from raynixl.errors import TransferTimeout
from raynixl.moe.cuda_kernel import Kernels, load_kernels
from raynixl.moe.cuda_nothing import nothings
from raynixl.moe.cuda_presence import Presence
from raynixl.moe.cuda_structs import RANKS, STATUSES, Layer, Mask, Page

if TYPE_CHECKING:
    from raynixl.moe.cuda_agreement import Agreed
    from raynixl.moe.cuda_device import Gpu
    from raynixl.native import Native

_HANG_SECONDS: Final = 30.0
_PAUSE: Final = 5e-5
_SLICE: Final = 2e-3
_LARGE_NBYTES: Final = 8 << 20
_ONE: Final = (1, 1, 1)
_SPARE_NBYTES: Final = 256


class GpuLayer:
    """One agreement's windows, as kernels know them. One thread at a time launches.

    Its memory is given back by `close` once nothing that was launched is left.
    """

    def __init__(self, gpu: Gpu, agreed: Agreed, core: Native, *, me: int, mask: int, look: Callable[[], None]) -> None:
        assert agreed.frame is not None
        assert agreed.own is not None
        self.gpu, self.frame, self.number = gpu, agreed.frame, agreed.number
        self.ranks = agreed.frame.ranks
        self.kernels = replace(_kernels(gpu.number), sharing=agreed.sharing)
        self._core = core
        self._context = cuda.primary(gpu.number)
        self._memory = cuda.arena(ctypes.sizeof(Layer) + _SPARE_NBYTES, gpu.number)
        self.address = self._memory.address
        with cuda.current(self._context):
            self._pinned = cuda.host_alloc(ctypes.sizeof(Page) + ctypes.sizeof(Layer))
            ctypes.memset(self._pinned, 0, ctypes.sizeof(Page) + ctypes.sizeof(Layer))
            self.page: Page | None = Page.from_address(self._pinned)
            self._page_there = cuda.host_device_address(self._pinned)
        gates = {rank: window.gates[0] for rank, window in agreed.windows.items()}
        self.presence = Presence(gpu.number, gates, look, f"raynixl-moe-{me}")
        self._me, self._windows = me, _addresses(agreed, me)
        self._lock = threading.Lock()  # protects what the watch writes to the page, and the page's end
        self._lost: dict[int, int] = {}  # by number, what was lost when that agreement was over
        self._stream: int | None = None
        self.tickets = 0  # grows for good: what a graph has captured tells its former one at every replay
        self._warm_up()
        self.renew(agreed, mask)

    def serves(self, agreed: Agreed) -> bool:
        """Whether this layer can go on under another agreement: nothing has another address, as graphs want it."""
        return agreed.frame == self.frame and _addresses(agreed, self._me).items() <= self._windows.items()

    def renew(self, agreed: Agreed, mask: int) -> None:
        """Begin anew under an agreement, without these ranks; nothing that was launched is left."""
        if self.number != agreed.number:
            self._lost[self.number] = self.lost_of(self.number)
        self.number = agreed.number
        windows = _addresses(agreed, self._me)
        self._known = sum(1 << rank for rank in windows)
        self._masked = (mask | ~self._known) & ((1 << 64) - 1)
        self.known_refusals = self._gone = self._refused = 0
        self._refusals = [0] * RANKS
        self._upload(
            self.frame.layer(self._me, windows, page=self._page_there, operation=agreed.number << 32, mask=self._masked)
        )

    def _warm_up(self) -> None:
        """Run every kernel once: CUDA loads code at first use, when one that waits for others would be in the way.

        So would a capture.
        """
        self._upload(Layer(page=self._page_there, masked=RANKS, ranks=1, capacity=1))
        with cuda.current(self._context):
            stream = cuda.stream_create()
            try:
                for kind, arguments in nothings(self.address):
                    self.launch(kind, arguments, _ONE, stream)
                self._wait(stream)
            finally:
                cuda.stream_destroy(stream)

    def _upload(self, layer: Layer) -> None:
        with cuda.current(self._context):
            stream = cuda.stream_create()
            try:
                ctypes.memset(self._pinned, 0, ctypes.sizeof(Page))
                self._put(layer, stream)
                self._wait(stream)
            finally:
                cuda.stream_destroy(stream)

    def _put(self, layer: Layer, stream: int) -> None:
        source = self._pinned + ctypes.sizeof(Page)
        ctypes.memmove(source, ctypes.addressof(layer), ctypes.sizeof(Layer))
        cuda.memcpy_h2d_async(self.address, source, ctypes.sizeof(Layer), stream)

    def _wait(self, stream: int) -> None:
        deadline = time.monotonic() + _HANG_SECONDS
        while not cuda.stream_query(stream):
            if time.monotonic() > deadline:
                raise TransferTimeout(
                    f"GPU {self.gpu.number} does nothing in {_HANG_SECONDS:g} s", hint="see what it does: nvidia-smi"
                )
            time.sleep(_PAUSE)

    # What kernels have told

    @property
    def told(self) -> Page:
        """What kernels tell the host, while the layer is open."""
        assert self.page is not None
        return self.page

    @property
    def lost(self) -> int:
        """Ranks that did not come in time, or are gone, 1 bit each, under the present agreement."""
        return self.lost_of(self.number)

    def lost_of(self, number: int) -> int:
        """Return the same of an agreement, by its number."""
        page = self.page
        if number != self.number or page is None:
            return self._lost.get(number, 0)
        return (int(page.lost) | self._gone) & self._known

    @property
    def masked_by(self) -> int | None:
        """The rank that goes on without us, if one does."""
        by = int(self.told.masked)
        return by - 1 if by else None

    def take_refusal(self) -> tuple[int, int] | None:
        """Return a rank whose line was refused, and why, once; not for what the caller has heard of at once.

        What kernels write there the host only reads: they do not wait for it to have done so.
        """
        page = self.told
        refused = int(page.refused)
        if refused == self._refused:
            return None
        before, now = self._refusals, list(page.refusals)
        self._refused, self._refusals = refused, now
        seen = sum(1 << rank for rank, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
        ranks, self.known_refusals = seen & ~self.known_refusals, self.known_refusals & ~seen
        if not ranks:
            return None
        rank = (ranks & -ranks).bit_length() - 1
        return rank, now[rank] % STATUSES

    def note_gone(self, ranks: int) -> None:
        """Hear which ranks have ended, or let go of their memory."""
        self._gone |= ranks
        self.excuse(ranks)

    def statuses(self) -> list[int]:
        """Return by rank what the last `arrive` has found wrong; it is told once."""
        page = self.told
        found = list(page.status[: self.ranks])
        self.known_refusals |= sum(1 << rank for rank, status in enumerate(found) if status)
        return found

    def excuse(self, ranks: int) -> None:
        """Have kernels that wait for these ranks wait no longer."""
        with self._lock:
            if self.page is not None and ranks & ~int(self.page.excused):
                self.page.excused |= ranks

    # Launches

    def begin(self, mask: int) -> Call:
        """Begin to put an operation on the current stream, without these ranks."""
        inside = cuda.current(self._context)
        inside.__enter__()
        try:
            return self._begin(mask, inside)
        except BaseException:
            inside.__exit__(None, None, None)
            raise

    def _begin(self, mask: int, inside: AbstractContextManager[Any]) -> Call:
        stream = self.gpu.stream()
        is_captured = cuda.stream_is_capturing(stream)
        if stream != self._stream:
            if not is_captured:
                self.presence.follow(stream)
            self._stream = stream
        self.note_gone(self.presence.enter())
        call = Call(self, stream, inside, is_captured=is_captured)
        fresh = (mask | self._gone) & ~self._masked
        if fresh:
            if not is_captured:  # what is captured may never run
                self._masked |= fresh
            call.launch("mask", Mask(self.address, self._masked | fresh, fresh & ~self._gone), _ONE)
        return call

    def note_replays(self) -> None:
        """Have who waits for the end wait for replays of graphs on this thread's current stream, too."""
        if self.presence.is_held:
            with cuda.current(self._context):
                self.presence.note(self.gpu.stream())

    def launch(self, kind: str, arguments: ctypes.Structure, grid: tuple[int, int, int], stream: int) -> None:
        """Start a kernel on a stream, in the context of this GPU."""
        function, threads = self.kernels[kind]
        cuda.launch(function, grid, (threads, 1, 1), [arguments], stream)

    def grid(self, kind: str, *, rows: int, nbytes: int, waits: bool = True) -> tuple[int, int, int]:
        """Return how many CTAs work on so many rows for each rank ("sum": in all), and may wait for others."""
        return (self.kernels.grid(kind, self.ranks, rows, nbytes, waits=waits), 1, 1)

    def waits_apart(self, nbytes: int) -> bool:
        """Whether one CTA shall wait before the others begin: they would hold a GPU that other ranks are to work on."""
        return self.kernels.sharing > 1 or nbytes >= _LARGE_NBYTES

    def wait_ticket(self, seconds: float, look: Callable[[], None]) -> None:
        """Wait, without the interpreter's lock, until the last `arrive` has told what came.

        Raises:
            TransferTimeout: the GPU does not get to it.
        """
        address, until = self._pinned + Page.ticket.offset, time.monotonic() + seconds
        while not self._core.look_for(address, self.tickets, _SLICE):
            look()
            if time.monotonic() > until:
                raise TransferTimeout(
                    f"GPU {self.gpu.number} has not come to a dispatch in {seconds:g} s",
                    hint="what is on the stream before it does not end: see nvidia-smi",
                )

    def close(self, deadline: float) -> bool:
        """Leave peers' memory and give ours back, but for the windows; False, and all stays, if a GPU does not end."""
        if not self.presence.close(deadline):
            return False
        with self._lock:
            self._lost[self.number], self.page = self.lost_of(self.number), None
        with cuda.current(self._context):
            cuda.host_free(self._pinned)
        self._memory.close()
        return True


class Call:
    """One operation on its way to a stream, its kernels in order, in the context of its GPU; to be left with `with`."""

    def __init__(self, layer: GpuLayer, stream: int, inside: AbstractContextManager[Any], *, is_captured: bool) -> None:
        self._layer, self._stream, self._inside, self.is_captured = layer, stream, inside, is_captured

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self._layer.presence.put(self._stream, is_captured=self.is_captured)
        finally:
            self._inside.__exit__(None, None, None)

    def launch(self, kind: str, arguments: ctypes.Structure, grid: tuple[int, int, int]) -> None:
        """Start a kernel behind those before."""
        self._layer.launch(kind, arguments, grid, self._stream)


def _kernels(device: int) -> Kernels:
    """Return the kernels of a GPU, loaded once for the process."""
    made: Kernels = cuda.kept(("moe kernels", device), lambda: load_kernels(device))
    return made


def _addresses(agreed: Agreed, me: int) -> dict[int, int]:
    """Return by rank where its window is reached."""
    assert agreed.own is not None
    return {rank: window.address for rank, window in agreed.windows.items()} | {me: agreed.own.memory.address}


def nanoseconds(seconds: float) -> int:
    """Return a duration as kernels take it."""
    return max(1, int(seconds * 1e9))


def address(tensor: Any) -> int:
    """Return where a tensor lies; 0 for none."""
    return 0 if tensor is None or tensor.numel() == 0 else int(tensor.data_ptr())
