"""Host memory that GPUs reach: our arenas and those of peers, pinned for as long as they are used."""

from __future__ import annotations

import logging
import threading

from raynixl import cuda
from raynixl.errors import BackendUnavailable, RaynixlError
from raynixl.memory import address_of, check_sealed, map_shared
from raynixl.region import Region, RemoteRegion

logger = logging.getLogger(__name__)


class Pins:
    """Our own regions in host memory, as GPUs see them. An arena is pinned at its first use with a GPU.

    Other memory is pinned only if its owner has done that: pages may hold more than what was registered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects _pins; held while pinning, so that it happens once
        self._pins: dict[int, cuda.Pin | None] = {}

    def address_of(self, region: Region) -> int | None:
        """Return where GPUs reach a region, or None if they do not."""
        memory = region.memory
        if memory.fd < 0:
            return cuda.pinned_address(memory.address, memory.nbytes)
        with self._lock:
            if region.id not in self._pins:
                try:
                    self._pins[region.id] = cuda.pin(memory.address, memory.nbytes)
                except RaynixlError as exc:
                    logger.warning("%s is not pinned, and staged instead: %s", region.label, exc)
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
        """Unpin all."""
        for region_id in list(self._pins):
            self.release(region_id)


class PeerArena:
    """A peer's arena in host memory, mapped here and pinned.

    Raises:
        BackendUnavailable: it cannot be mapped or pinned.
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
        try:
            self._pin = cuda.pin(address_of(self._mapping), remote.nbytes)
        except RaynixlError as exc:
            self._mapping.close()
            raise BackendUnavailable(
                f"{remote.label} cannot be pinned: {exc.message}", hint=exc.hint, peer=remote.owner
            ) from exc
        self.address = self._pin.device_address

    def close(self) -> None:
        """Unpin and unmap it."""
        self._pin.close()
        self._mapping.close()
