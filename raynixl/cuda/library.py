"""The library of the CUDA driver: loaded when it is first needed, called, and what its errors mean.

`current_driver` is the one way to it: tests put a driver of their own there.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from ctypes import byref, c_char_p
from dataclasses import dataclass, field
from typing import Any

from raynixl.cuda.prototypes import PROTOTYPES
from raynixl.errors import BackendUnavailable, ConfigError, RangeError, RaynixlError

logger = logging.getLogger(__name__)

_LIBRARY = "libcuda.so.1"
INVALID_VALUE, DEINITIALIZED, NOT_READY, PEER_ALREADY_ENABLED = 1, 4, 600, 704

_GONE = "its context was destroyed or reset; end whatever calls cudaDeviceReset"
_BROKEN = "a kernel has failed on that GPU and its context is lost: restart this process"
_CODE = "the code of a kernel does not suit this GPU or driver: update the driver"
_MISMATCH = "the driver and its library are of different versions: reboot, or restart the container"
_CAPTURE = "this cannot be captured in a CUDA graph: do it before the capture, or after it"
_MEANING: dict[int, tuple[type[RaynixlError], str]] = {
    2: (RangeError, "ask for less, or free memory on that GPU: see nvidia-smi"),
    3: (BackendUnavailable, "CUDA does not live through a fork: use the start method 'spawn', or fork before its use"),
    4: (BackendUnavailable, "the process is ending"),
    34: (BackendUnavailable, "a stub of libcuda.so.1 was loaded: take it off LD_LIBRARY_PATH"),
    46: (BackendUnavailable, "another process has that GPU for itself alone: see nvidia-smi -q -d COMPUTE"),
    100: (ConfigError, "this process sees no GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES"),
    101: (ConfigError, "this process does not see that GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES"),
    200: (BackendUnavailable, _CODE), 209: (BackendUnavailable, _CODE), 218: (BackendUnavailable, _CODE),
    222: (BackendUnavailable, _CODE),
    201: (ConfigError, _GONE), 709: (ConfigError, _GONE),
    214: (BackendUnavailable, "memory of that GPU is defective: see nvidia-smi -q -d ECC"),
    217: (BackendUnavailable, "these GPUs do not reach each other's memory: see nvidia-smi topo -p2p r"),
    220: (BackendUnavailable, "a link of that GPU is defective: see nvidia-smi nvlink -e"),
    700: (BackendUnavailable, _BROKEN), 710: (BackendUnavailable, _BROKEN), 714: (BackendUnavailable, _BROKEN),
    715: (BackendUnavailable, _BROKEN), 716: (BackendUnavailable, _BROKEN), 717: (BackendUnavailable, _BROKEN),
    718: (BackendUnavailable, _BROKEN), 719: (BackendUnavailable, _BROKEN),
    711: (BackendUnavailable, "that GPU reaches no more than 8 others at a time without NVSwitch"),
    712: (ConfigError, "these pages are pinned already: register the same range, or give it to one owner"),
    713: (ConfigError, "these pages are not pinned"),
    800: (BackendUnavailable, "this process may not do that: see the container's settings"),
    801: (BackendUnavailable, "this GPU or driver cannot do that"),
    802: (BackendUnavailable, "the GPUs are not ready: start nvidia-fabricmanager, or wait for it"),
    803: (BackendUnavailable, _MISMATCH), 804: (BackendUnavailable, _MISMATCH),
    **dict.fromkeys(range(900, 909), (ConfigError, _CAPTURE)),
}  # fmt: skip


@dataclass(eq=False)
class Driver:
    """The library, and what this process has asked of it and keeps."""

    library: Any
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Protects the dicts; held over what makes their values, so that each is made once."""
    primaries: dict[int, int] = field(default_factory=dict)
    ordinals: dict[int, int] = field(default_factory=dict)
    peers: set[tuple[int, int]] = field(default_factory=set)
    devices: tuple[Any, ...] | None = None
    events: dict[int, deque[int]] = field(default_factory=dict)
    pins: dict[tuple[int, int], Any] = field(default_factory=dict)
    kept: dict[Any, Any] = field(default_factory=dict)
    making: threading.RLock = field(default_factory=threading.RLock)
    """Protects `kept` while something is made for it: compiling kernels takes seconds."""
    parents: tuple[Any, ...] = ()

    def forget(self) -> None:
        """Know nothing, in a child: CUDA does not live through a fork, and locks may be held by threads left behind.

        What the parent has is not let go of here, but kept: its ends would wait for such locks.
        """
        self.parents = (self.parents, self.kept, self.pins, self.events)
        self.lock, self.making = threading.RLock(), threading.RLock()
        self.devices = None
        self.primaries, self.ordinals, self.peers = {}, {}, set()
        self.kept, self.pins, self.events = {}, {}, {}


@functools.cache
def _load() -> Driver:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return Driver(None)
    for name, types in PROTOTYPES.items():
        function = getattr(library, name, None)  # an old driver lacks some
        if function is not None:
            function.argtypes = types
            function.restype = ctypes.c_int
    return Driver(library)


_replaced: list[Driver] = []  # by tests; the last one counts


def _forget_all() -> None:
    for driver in (*_replaced, *([_load()] if _load.cache_info().currsize else [])):
        driver.forget()


os.register_at_fork(after_in_child=_forget_all)


def current_driver() -> Driver:
    """Return the driver that this process uses; its `library` is None where there is none."""
    return _replaced[-1] if _replaced else _load()


def replace_driver(library: Any) -> Callable[[], None]:
    """Put another library in the driver's place, for tests; returns what takes it out again."""
    driver = Driver(library)
    _replaced.append(driver)
    return lambda: _replaced.remove(driver)


def has_driver() -> bool:
    """Whether this host has a driver for NVIDIA GPUs; loads nothing else."""
    return current_driver().library is not None


def call(name: str, *arguments: Any) -> int:
    """Call a function of the driver and return its code.

    Raises:
        BackendUnavailable: there is no driver, or it is too old to have that function.
    """
    library = current_driver().library
    if library is None:
        raise BackendUnavailable("this needs the NVIDIA driver (libcuda.so.1), which is not here")
    function = getattr(library, name, None)
    if function is None:
        raise BackendUnavailable(f"the NVIDIA driver has no {name}", hint="update the driver")
    code: int = function(*arguments)
    return code


def check(name: str, *arguments: Any, what: str = "", hint: str = "") -> None:
    """Call a function of the driver that must succeed; `what` says with what, `hint` what to do if it fails.

    Raises:
        RangeError: the GPU has no memory left.
        ConfigError: an argument, device or context is not usable.
        BackendUnavailable: any other error of CUDA.
    """
    if code := call(name, *arguments):
        raise failure(code, name, what=what, hint=hint)


def give_back(name: str, *arguments: Any) -> None:
    """Call a function of the driver that takes something back. If it fails, the log says so: there is no other way.

    That happens once a kernel has failed and the context is lost, and with it all that is held there.
    """
    code = call(name, *arguments)
    if code and code != DEINITIALIZED:
        error = failure(code, name)
        logger.warning("memory of a GPU is not given back: %s", error)


def failure(code: int, name: str, *, what: str = "", hint: str = "") -> RaynixlError:
    """Return the error to raise for a code of CUDA."""
    kind, remedy = _MEANING.get(code, (BackendUnavailable, "see the message, `raynixl doctor` and dmesg"))
    kind = ConfigError if code == INVALID_VALUE else kind
    about = f" of {what}" if what else ""
    return kind(f"{name}{about} failed: {error_name(code)}", hint=hint if hint else remedy)


def error_name(code: int) -> str:
    """Return what CUDA calls an error, with its number: 'CUDA_ERROR_OUT_OF_MEMORY (2)'."""
    text = c_char_p()
    known = has_driver() and call("cuGetErrorName", code, byref(text)) == 0 and text.value is not None
    return f"{(text.value or b'').decode()} ({code})" if known else f"CUDA error {code}"


def kept(key: Any, make: Callable[[], Any]) -> Any:
    """Return what this process keeps under a key for as long as it uses this driver; it is made once."""
    driver = current_driver()
    if key in driver.kept:
        return driver.kept[key]
    with driver.making:
        if key not in driver.kept:
            driver.kept[key] = make()
        return driver.kept[key]
