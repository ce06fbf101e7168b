"""Endpoints and remote keys of the ctypes twin: the way to one peer, and who may use it how long."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Final

from raynixl.native import twin_ucp as ucp

if TYPE_CHECKING:
    from raynixl.native.twin_ucx import Rail

__all__ = ["Endpoint", "RemoteKey"]

_MOST_TRANSPORTS = 64


class Endpoint:
    """One UCX endpoint to one peer, with peer error handling. Lives until it has been closed."""

    def __init__(self, rail: Rail, token: int) -> None:
        self.rail: Final = rail
        self.code = 0
        self.error = ucp.OK
        self.handle: int | None = None
        self.read_limit = 0
        self._token = token
        self._lock = threading.Lock()  # protects what follows and the first code
        self._posters = 1  # whoever creates it
        self._closing: int | None = None  # UCX's request
        self._is_gone = False

    def limit_reads(self, nbytes: int) -> None:
        """Let at most so many bytes of reads be under way; here each program takes an eighth of it for itself."""
        self.read_limit = nbytes

    def create(self, address: bytes) -> None:
        """Have UCX make it. RuntimeError: no transport reaches the peer."""
        rail = self.rail
        params = ucp.EpParams(
            field_mask=ucp.EP_ADDRESS | ucp.EP_ERR_MODE | ucp.EP_ERR_HANDLER,
            address=ctypes.cast(ctypes.c_char_p(address), ctypes.c_void_p),
            err_mode=ucp.ERR_MODE_PEER,
            err_callback=ctypes.cast(rail.on_error, ctypes.c_void_p),
            err_arg=self._token,
        )
        ep = ctypes.c_void_p()
        rail.remember(self._token, self)
        status = rail.ucp.ep_create(rail.worker, ctypes.byref(params), ctypes.byref(ep))
        if status != ucp.OK:
            self._let_go()
        ucp.check("UCX makes no endpoint", status)
        self.handle = ep.value
        self.leave()

    @property
    def status(self) -> str:
        """What UCX said when the peer or the way to it failed, or ''."""
        return ucp.status_text(self.error) if self.error != ucp.OK else ""

    @property
    def is_gone(self) -> bool:
        """Whether it has been closed and UCX has let go of it."""
        if self._closing is not None and not self.rail.is_forked:
            with self._lock:
                request = self._closing
                if request is not None and self.rail.ucp.check_status(request) != ucp.IN_PROGRESS:
                    self.rail.ucp.request_free(request)
                    self._let_go()
        return self._is_gone

    @property
    def transports(self) -> list[str]:
        """What UCX has chosen to carry it, as transport/device. Empty once closed."""
        if self.rail.is_forked or self.enter() != 0:
            return []
        try:
            entries = (ucp.TransportEntry * _MOST_TRANSPORTS)()
            transports = ucp.Transports(entries, _MOST_TRANSPORTS, ctypes.sizeof(ucp.TransportEntry))
            attributes = ucp.EpAttr(field_mask=ucp.EP_ATTR_TRANSPORTS, transports=transports)
            if self.rail.ucp.ep_query(self.handle, ctypes.byref(attributes)) != ucp.OK:
                return []
            found = entries[: attributes.transports.num_entries]
            return [f"{entry.transport.decode()}/{entry.device.decode()}" for entry in found]
        finally:
            self.leave()

    def unpack(self, key: bytes, address: int, nbytes: int) -> RemoteKey:
        """Take the key of a peer's mapping, and the range that it stands for."""
        if not self.rail.is_usable or self.enter() != 0:
            raise RuntimeError("the endpoint is closed")
        try:
            rkey = ctypes.c_void_p()
            status = self.rail.ucp.ep_rkey_unpack(self.handle, key, ctypes.byref(rkey))
        finally:
            self.leave()
        ucp.check("UCX does not take the peer's key", status)
        return RemoteKey(self, rkey.value, address, nbytes)

    def close(self, code: int) -> None:
        """Refuse later operations with `code` and end those in flight by force. Does not wait; the first code stays."""
        if self.rail.is_forked:
            return
        with self._lock:
            if self.code != 0:
                return
            self.code = code
            if self._posters == 0:  # else the last who posts does it, at his next row
                self._close_handle()
        self.rail.ring()

    def failed(self, status: int) -> None:
        """Hear that the peer, or the way to it, is gone. The owner hears of it and closes."""
        if self.error == ucp.OK:
            self.error = status
            self.rail.ring()

    def enter(self) -> int:
        """Begin to post; return the code of a closed endpoint, else 0, and then it is not closed until `leave`."""
        with self._lock:
            if self.code == 0:
                self._posters += 1
            return self.code

    def leave(self) -> None:
        """End posting."""
        with self._lock:
            self._posters -= 1
            if self._posters == 0 and self.code != 0:
                self._close_handle()

    def _close_handle(self) -> None:
        ep, self.handle = self.handle, None
        param = ucp.RequestParam(op_attr_mask=ucp.FIELD_FLAGS, flags=ucp.CLOSE_FORCE)
        request = self.rail.ucp.ep_close_nbx(ep, ctypes.byref(param))
        self.rail.signal()  # even if it is closed at once, UCX ends what was in flight only at its next progress
        if request is None or ucp.error_of(request) != ucp.OK:
            self._let_go()
        else:
            self._closing = request

    def _let_go(self) -> None:
        self._closing = None
        self._is_gone = True
        self.rail.forget(self._token)


class RemoteKey:
    """A span of a peer's memory, reachable over one endpoint."""

    def __init__(self, endpoint: Endpoint, handle: int | None, address: int, nbytes: int) -> None:
        self.endpoint: Final = endpoint
        self.address: Final = address
        self.nbytes: Final = nbytes
        self.handle = handle

    def destroy(self) -> None:
        """Let go of it. Idempotent."""
        handle, self.handle = self.handle, None
        if handle is not None and self.endpoint.rail.is_alive:
            self.endpoint.rail.ucp.rkey_destroy(handle)
