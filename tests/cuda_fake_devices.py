"""GPUs and contexts of the fake CUDA driver."""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_int, c_void_p
from typing import TYPE_CHECKING

from cuda_fake_core import Misuse, Refused, put

if TYPE_CHECKING:
    from cuda_fake import FakeCuda

PRIMARY = 0x1000
"""The primary context of GPU n is PRIMARY + n."""
INVALID_DEVICE, INVALID_CONTEXT, PEER_UNSUPPORTED, PEER_ALREADY = 101, 201, 217, 704
MULTIPROCESSORS, FABRIC_SUPPORTED = 16, 128


class Devices:
    """Which GPUs there are, and which context each thread works in."""

    def __init__(self, fake: FakeCuda, visible: tuple[int, ...], has_peer_access: bool) -> None:
        self._fake = fake
        self.visible = visible
        self.has_peer_access = has_peer_access
        self.contexts: dict[int, int] = {}
        """The GPU of each context."""
        self.retained: list[int] = []
        self.peers: set[tuple[int, int]] = set()
        self.attributes = {MULTIPROCESSORS: 132, FABRIC_SUPPORTED: 1}
        self.is_broken = False
        self.is_initialised = False
        self._stacks: dict[int, list[int]] = {}

    def uuid(self, device: int) -> bytes:
        """The identity of a GPU as this process numbers it: the same in every process."""
        return (0xF0 + self.visible[device]).to_bytes(16, "big")

    def find(self, uuid: bytes) -> int:
        """The number of a GPU here, or -1 if this process does not see it."""
        return next((one for one in range(len(self.visible)) if self.uuid(one) == uuid), -1)

    @property
    def stack(self) -> list[int]:
        """The contexts that this thread has pushed; natives have no threading.local that would last."""
        return self._stacks.setdefault(threading.get_native_id(), [])

    @property
    def current(self) -> int:
        """This thread's context."""
        if not self.stack:
            raise Misuse("no context is current in this thread")
        return self.stack[-1]

    def make_context(self, device: int) -> int:
        """Make a context beside the primary one, as a user's program may."""
        number = 0xC0 + len(self.contexts)
        self.contexts[number] = device
        return number

    def retain(self, device: int) -> int:
        """Return the primary context of a GPU."""
        self.contexts[PRIMARY + device] = device
        return PRIMARY + device

    def reaches(self, context: int, owner: int) -> bool:
        """Whether work in a context may use memory of another one."""
        same = self.contexts.get(context) == self.contexts.get(owner)
        return same or (context, owner) in self.peers

    def leaks(self) -> list[str]:
        """Contexts that a thread has left pushed."""
        return [f"thread {thread} left contexts {stack}" for thread, stack in self._stacks.items() if stack]

    def _device(self, device: int) -> int:
        if not 0 <= device < len(self.visible):
            raise Refused(INVALID_DEVICE)
        return device

    def _cuInit(self, flags: int) -> None:  # noqa: N802
        self.is_initialised = True
        if not self.visible:
            raise Refused(100)

    def _cuDeviceGet(self, out: int, device: int) -> None:  # noqa: N802
        put(out, c_int, self._device(device))

    def _cuDeviceGetCount(self, out: int) -> None:  # noqa: N802
        put(out, c_int, len(self.visible))

    def _cuDeviceGetUuid_v2(self, out: int, device: int) -> None:  # noqa: N802
        ctypes.memmove(out, self.uuid(self._device(device)), 16)

    def _cuDeviceGetPCIBusId(self, out: int, nbytes: int, device: int) -> None:  # noqa: N802
        text = f"0000:{self.visible[self._device(device)] + 1:02x}:00.0".encode() + b"\0"
        ctypes.memmove(out, text[:nbytes], min(nbytes, len(text)))

    def _cuDeviceGetAttribute(self, out: int, attribute: int, device: int) -> None:  # noqa: N802
        self._device(device)
        put(out, c_int, self.attributes.get(attribute, 0))

    def _cuDevicePrimaryCtxRetain(self, out: int, device: int) -> None:  # noqa: N802
        self.retained.append(self._device(device))
        put(out, c_void_p, self.retain(device))

    def _cuDeviceCanAccessPeer(self, out: int, device: int, other: int) -> None:  # noqa: N802
        self._device(device), self._device(other)
        put(out, c_int, int(self.has_peer_access and device != other))

    def _cuCtxEnablePeerAccess(self, context: int, flags: int) -> None:  # noqa: N802
        if not self.has_peer_access:
            raise Refused(PEER_UNSUPPORTED)
        if (self.current, context) in self.peers:
            raise Refused(PEER_ALREADY)
        self.peers.add((self.current, context))

    def _cuCtxPushCurrent_v2(self, context: int | None) -> None:  # noqa: N802
        if self.is_broken or context not in self.contexts:
            raise Refused(INVALID_CONTEXT)
        self.stack.append(context)

    def _cuCtxPopCurrent_v2(self, out: int) -> None:  # noqa: N802
        if not self.stack:
            raise Misuse("more contexts are popped than were pushed")
        put(out, c_void_p, self.stack.pop())

    def _cuCtxGetCurrent(self, out: int) -> None:  # noqa: N802
        put(out, c_void_p, self.stack[-1] if self.stack else None)

    def _cuCtxSetCurrent(self, context: int | None) -> None:  # noqa: N802
        self.stack[-1:] = [] if context is None else [context]

    def _cuCtxGetDevice(self, out: int) -> None:  # noqa: N802
        put(out, c_int, self.contexts[self.current])

    def _cuCtxGetStreamPriorityRange(self, least: int, greatest: int) -> None:  # noqa: N802
        put(least, c_int, 0)
        put(greatest, c_int, -5)
