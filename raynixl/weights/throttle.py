"""The throttle: holds a pull to a number of bytes a second, over all of its threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from raynixl.errors import ConfigError, TransferTimeout

_LOOK_SECONDS = 0.1  # how often what waits for its turn looks whether it is over


class Throttle:
    """Lets so many gigabits a second through, or all if None; a chunk waits for its turn before it is pulled.

    Raises:
        ConfigError: the rate is not positive.
    """

    def __init__(self, max_gbps: float | None = None) -> None:
        if max_gbps is not None and not max_gbps > 0:
            raise ConfigError(f"max_gbps={max_gbps!r} is not usable", hint="give gigabits a second, or None")
        self.max_gbps = max_gbps
        self._lock = threading.Lock()  # protects _free
        self._free = 0.0  # when the next bytes may go

    def take(self, nbytes: int, timeout: float, is_over: Callable[[], bool]) -> None:
        """Wait for the turn of so many bytes, or until it `is_over`: then they do not go.

        Raises:
            TransferTimeout: it does not come in time.
        """
        if self.max_gbps is None:
            return
        with self._lock:
            now = time.monotonic()
            begins = max(now, self._free)
            if begins - now > timeout:
                raise TransferTimeout(
                    f"{nbytes} bytes have no room in {self.max_gbps:g} Gbit/s in time", hint="raise max_gbps"
                )
            seconds = nbytes * 8e-9 / self.max_gbps
            self._free = begins + seconds
        while (left := begins - time.monotonic()) > 0:
            if is_over():
                with self._lock:
                    self._free -= seconds
                return
            time.sleep(min(left, _LOOK_SECONDS))
