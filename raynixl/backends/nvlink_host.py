"""Host memory that GPUs reach: our arenas and those of peers, pinned for as long as they are used."""

from __future__ import annotations

import logging
import threading

from raynixl import cuda
from raynixl.errors import AgentClosed, BackendUnavailable, RaynixlError, RegionStale
from raynixl.memory import address_of, check_sealed, map_shared
from raynixl.region import Region, RemoteRegion

logger = logging.getLogger(__name__)


class Pins:
    """Our own regions in host memory, as GPUs see them. An arena is pinned at its first use with a GPU.

    Other memory is pinned only if its owner has done that: pages may hold more than what was registered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects all below; held while pinning, so that it happens once
        self._pins: dict[int, cuda.Pin | None] = {}
        self._is_closed = False

    def address_of(self, region: Region) -> int | None:
        """Return where GPUs reach a region, or None if they do not.

        Raises:
            RegionStale, AgentClosed: it is being withdrawn, or the agent closed; then nothing is pinned any more.
        """
        memory = region.memory
        if memory.fd < 0:
            return cuda.pinned_address(memory.address, memory.nbytes)
        with self._lock:
            if region.id not in self._pins:
                self._check_open(region)
                try:
                    self._pins[region.id] = cuda.pin(memory.address, memory.nbytes)
                except RaynixlError as exc:
                    _say_staged(region.label, exc)
                    self._pins[region.id] = None
            pin = self._pins[region.id]
        return None if pin is None else pin.device_address

    def is_settled(self, region: Region) -> bool:
        """Whether `address_of` answers at once."""
        return region.memory.fd < 0 or region.id in self._pins

    def release(self, region_id: int) -> None:
        """Unpin a region; no GPU uses it any more."""
        with self._lock:
            pin = self._pins.pop(region_id, None)
        if pin is not None:
            pin.close()

    def close(self) -> None:
        """Unpin all; nothing is pinned afterwards."""
        with self._lock:
            self._is_closed = True
        for region_id in list(self._pins):
            self.release(region_id)

    def _check_open(self, region: Region) -> None:
        """Refuse what nobody would unpin: `release` comes after a region's gate was closed, and then not again."""
        if self._is_closed:
            raise AgentClosed(f"agent {region.owner!r} was closed", hint="make a new one")
        if not region.is_registered:
            raise RegionStale(f"{region.label} is no longer registered", hint="register the memory again")


class PeerArena:
    """A peer's arena in host memory, mapped here and pinned; where that cannot be, `address` is the host's.

    Raises:
        BackendUnavailable: it cannot be mapped.
    """

    def __init__(self, fd: int, remote: RemoteRegion) -> None:
        check_sealed(fd, remote.nbytes)
        try:
            self._mapping = map_shared(fd, remote.nbytes)
        except OSError as exc:
            raise BackendUnavailable(
                f"{remote.label} cannot be mapped: {exc.strerror}", hint="free memory, or raise vm.max_map_count",
                peer=remote.owner,
            ) from exc  # fmt: skip
        self.address = address_of(self._mapping)
        self._pin: cuda.Pin | None = None
        try:
            self._pin = cuda.pin(self.address, remote.nbytes)
            self.address = self._pin.device_address
        except RaynixlError as exc:
            _say_staged(remote.label, exc)

    @property
    def is_pinned(self) -> bool:
        """Whether GPUs reach it."""
        return self._pin is not None

    def close(self) -> None:
        """Unpin and unmap it."""
        if self._pin is not None:
            self._pin.close()
        self._mapping.close()


def _say_staged(label: str, why: RaynixlError) -> None:
    """Log it by its text: a record that is kept must not hold on to the frames of all who raised the error."""
    logger.warning("%s is not pinned, and staged instead: %s; %s", label, why.message, why.hint)
