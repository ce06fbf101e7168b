"""GPUs and their contexts: which there are, which one a thread works in, and who reaches whose memory."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from ctypes import byref, c_int, c_void_p
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from raynixl.cuda.library import PEER_ALREADY_ENABLED, call, check, current_driver, failure, has_driver
from raynixl.errors import BackendUnavailable, ConfigError, RaynixlError

logger = logging.getLogger(__name__)

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU that this process sees: its number here, and its identity everywhere."""

    index: int
    uuid: str


class relaxed:  # noqa: N801  (reads as a sentence: `with relaxed():`)
    """Let this thread do meanwhile what would break a CUDA graph that another thread captures.

    As torch captures by default, each allocation or look at an event, on whatever stream and in whatever thread, would
    fail otherwise, and the capture with it. None of ours concerns what is captured.
    """

    __slots__ = ("_mode",)

    def __enter__(self) -> Self:
        self._mode = c_int(_RELAXED)
        call("cuThreadExchangeStreamCaptureMode", byref(self._mode))  # tells of kernels that failed: others will, too
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mode.value != _RELAXED:
            call("cuThreadExchangeStreamCaptureMode", byref(self._mode))


class current(relaxed):  # noqa: N801  (likewise: `with current(context):`)
    """Make a context the current one of this thread meanwhile; the thread is `relaxed`.

    Raises:
        ConfigError: the driver does not take it.
    """

    __slots__ = ("_context", "_is_pushed")

    def __init__(self, context: int) -> None:
        self._context = context
        self._is_pushed = False

    def __enter__(self) -> Self:
        now = c_void_p()
        if call("cuCtxGetCurrent", byref(now)) or now.value != self._context:
            if code := call("cuCtxPushCurrent_v2", self._context):
                hint = "it was destroyed or reset"
                raise ConfigError(failure(code, "cuCtxPushCurrent", what="a GPU's context").message, hint=hint)
            self._is_pushed = True
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._is_pushed:
            self._is_pushed = False
            call("cuCtxPopCurrent_v2", byref(c_void_p()))


def let_go(context: int, give: Callable[[], object]) -> None:
    """Call what lets go of something in a context. What fails is said in the log: the context is lost then.

    Whoever lets go of several things goes on with the next one.
    """
    try:
        with current(context):
            give()
    except RaynixlError as exc:
        logger.warning("memory of a GPU is not given back: %s", exc)


def on(device: int) -> current:
    """Work with a GPU in its primary context meanwhile, the one that torch and cupy use. Initialises CUDA.

    Raises:
        ConfigError, BackendUnavailable: there is no such GPU, or it cannot be used.
    """
    return current(primary(device))


def primary(device: int) -> int:
    """Return the primary context of a GPU, which then stays for as long as the process lives. Initialises CUDA.

    Raises:
        ConfigError, BackendUnavailable: there is no such GPU, or it cannot be used.
    """
    driver = current_driver()
    known = driver.primaries.get(device)
    if known is not None:
        return known
    with driver.lock:
        if device not in driver.primaries:
            handle, context = _handle(device), c_void_p()
            check("cuDevicePrimaryCtxRetain", byref(context), handle, what=f"GPU {device}")
            driver.primaries[device] = context.value or 0
            driver.ordinals[context.value or 0] = device
        return driver.primaries[device]


def a_context() -> int:
    """Return any context: this thread's, one that we use already, or that of the first GPU."""
    now = c_void_p()
    if call("cuCtxGetCurrent", byref(now)) == 0 and now.value:
        return now.value
    return next(iter(list(current_driver().primaries.values())), 0) or primary(0)


def device_here() -> int:
    """Return the GPU that this thread works with: its context's, else one that we use already, else the first."""
    now = c_void_p()
    if call("cuCtxGetCurrent", byref(now)) == 0 and now.value:
        return device_of_context(now.value)
    return next(iter(list(current_driver().primaries)), 0)


def device_of_context(context: int) -> int:
    """Return the number of the GPU that a context belongs to."""
    driver = current_driver()
    if context not in driver.ordinals:
        handle = c_int()
        with current(context):
            check("cuCtxGetDevice", byref(handle))
        driver.ordinals[context] = handle.value  # CUdevice is the number that cuDeviceGet was given
    return driver.ordinals[context]


def devices() -> tuple[Device, ...]:
    """Return the GPUs that this process sees, in their order; none where there is no driver. Initialises CUDA.

    Raises:
        BackendUnavailable: CUDA cannot be initialised.
    """
    driver = current_driver()
    if driver.library is None:
        return ()
    if driver.devices is None:
        with driver.lock:
            count = c_int()
            if not _initialise_or_none():
                return ()
            check("cuDeviceGetCount", byref(count))
            driver.devices = tuple(Device(index, _uuid(index)) for index in range(count.value))
    return driver.devices


def device_attribute(device: int, attribute: int) -> int:
    """Return a CU_DEVICE_ATTRIBUTE_* of a GPU, by its number."""
    value = c_int()
    check("cuDeviceGetAttribute", byref(value), attribute, _handle(device), what=f"GPU {device}")
    return value.value


def enable_peer(device: int, other: int) -> None:
    """Let kernels and copies of a GPU reach the memory of another one of this process. Once done it stays.

    Raises:
        BackendUnavailable: the two have no peer access.
    """
    driver = current_driver()
    if device == other or (device, other) in driver.peers:
        return
    answer = c_int()
    check("cuDeviceCanAccessPeer", byref(answer), _handle(device), _handle(other))
    if not answer.value:
        raise BackendUnavailable(
            f"GPU {device} does not reach the memory of GPU {other}", hint="see nvidia-smi topo -p2p r"
        )
    theirs = primary(other)
    with driver.lock, on(device):
        code = call("cuCtxEnablePeerAccess", theirs, 0)
        if code not in (0, PEER_ALREADY_ENABLED):
            raise failure(code, "cuCtxEnablePeerAccess", what=f"GPU {device} to GPU {other}")
        driver.peers.add((device, other))


def bus_id(device: int) -> str:
    """Return the PCI address of a GPU as CUDA numbers it, '' where that cannot be asked."""
    if not has_driver():
        return ""
    text, handle = ctypes.create_string_buffer(32), c_int()
    if call("cuDeviceGet", byref(handle), device) or call("cuDeviceGetPCIBusId", text, len(text), handle):
        return ""
    return text.value.decode()


def current_functions() -> tuple[int, int]:
    """Return the addresses of the functions that get and set a thread's current context, for native code."""
    return function_address("cuCtxGetCurrent"), function_address("cuCtxSetCurrent")


def function_address(name: str) -> int:
    """Return where a function of the driver lies, for native code."""
    return ctypes.cast(getattr(current_driver().library, name), c_void_p).value or 0


def _initialise_or_none() -> bool:
    code = call("cuInit", 0)
    if code == 100:  # CUDA_ERROR_NO_DEVICE: a driver without GPUs is no error
        return False
    if code:
        raise failure(code, "cuInit")
    return True


def _handle(device: int) -> int:
    if not has_driver():
        raise ConfigError(
            "a GPU needs the NVIDIA driver (libcuda.so.1), which is not here", hint="see `raynixl doctor`"
        )
    check("cuInit", 0)
    handle = c_int()
    check("cuDeviceGet", byref(handle), device, what=f"GPU {device}", hint="see nvidia-smi and CUDA_VISIBLE_DEVICES")
    return handle.value


def _uuid(device: int) -> str:
    raw = (ctypes.c_ubyte * 16)()
    check("cuDeviceGetUuid_v2", byref(raw), _handle(device), what=f"GPU {device}")
    return bytes(raw).hex()
