"""UCX's C interface in ctypes: the part that native/ucp_abi.h declares for the compiled core, found at run time."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any, Final

__all__ = [
    "EpAttr",
    "EpParams",
    "Library",
    "MemMapParams",
    "RequestParam",
    "TransportEntry",
    "Transports",
    "check",
    "error_of",
    "library",
    "status_text",
]

OK: Final = 0
IN_PROGRESS: Final = 1
NO_MEMORY: Final = -4
INVALID_ADDRESS: Final = -7
UNSUPPORTED: Final = -22

FIELD_CALLBACK: Final = 1 << 1
FIELD_USER_DATA: Final = 1 << 2
FIELD_FLAGS: Final = 1 << 4
FIELD_MEMORY_TYPE: Final = 1 << 6
FIELD_MEMH: Final = 1 << 8
MULTI_SEND: Final = 1 << 19
CLOSE_FORCE: Final = 1 << 0

MAP_ADDRESS: Final = 1 << 0
MAP_LENGTH: Final = 1 << 1
MAP_MEMORY_TYPE: Final = 1 << 4

EP_ADDRESS: Final = 1 << 0
EP_ERR_MODE: Final = 1 << 1
EP_ERR_HANDLER: Final = 1 << 2
ERR_MODE_PEER: Final = 1

EP_ATTR_TRANSPORTS: Final = 1 << 3

FIRST_ERROR: Final = (1 << 64) - 100
"""A call that returns this or more, where it may return a request, has failed."""

_SOCKADDR_STORAGE = ctypes.c_uint64 * 16

SendCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
"""Takes the first of UCX's three arguments, the request: the others, in registers, are left unread."""

ErrorCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int8)


class RequestParam(ctypes.Structure):
    """ucp_request_param_t."""

    _fields_ = (
        ("op_attr_mask", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("request", ctypes.c_void_p),
        ("send", ctypes.c_void_p),
        ("datatype", ctypes.c_uint64),
        ("user_data", ctypes.c_void_p),
        ("reply_buffer", ctypes.c_void_p),
        ("memory_type", ctypes.c_int),
        ("recv_info", ctypes.c_void_p),
        ("memh", ctypes.c_void_p),
    )


class MemMapParams(ctypes.Structure):
    """ucp_mem_map_params_t."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("flags", ctypes.c_uint),
        ("prot", ctypes.c_uint),
        ("memory_type", ctypes.c_int),
        ("exported_memh_buffer", ctypes.c_void_p),
    )


class SockAddr(ctypes.Structure):
    """ucs_sock_addr_t."""

    _fields_ = (("addr", ctypes.c_void_p), ("addrlen", ctypes.c_uint32))


class EpParams(ctypes.Structure):
    """ucp_ep_params_t."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("err_mode", ctypes.c_int),
        ("err_callback", ctypes.c_void_p),
        ("err_arg", ctypes.c_void_p),
        ("user_data", ctypes.c_void_p),
        ("flags", ctypes.c_uint),
        ("sockaddr", SockAddr),
        ("conn_request", ctypes.c_void_p),
        ("name", ctypes.c_void_p),
        ("local_sockaddr", SockAddr),
    )


class TransportEntry(ctypes.Structure):
    """ucp_transport_entry_t."""

    _fields_ = (("transport", ctypes.c_char_p), ("device", ctypes.c_char_p))


class Transports(ctypes.Structure):
    """ucp_transports_t."""

    _fields_ = (
        ("entries", ctypes.POINTER(TransportEntry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
    )


class EpAttr(ctypes.Structure):
    """ucp_ep_attr_t."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", _SOCKADDR_STORAGE),
        ("remote_sockaddr", _SOCKADDR_STORAGE),
        ("transports", Transports),
        ("user_data", ctypes.c_void_p),
    )


_STATUS = ctypes.c_int8  # ucs_status_t is one signed byte
_POINTER = ctypes.c_void_p
_SIZE = ctypes.c_size_t
_OUT = ctypes.c_void_p  # where a result is written: byref is taken too
_RMA = (_POINTER, _POINTER, _SIZE, ctypes.c_uint64, _POINTER, _POINTER)

SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "ucp_worker_get_address": (_STATUS, (_POINTER, _OUT, _OUT)),
    "ucp_worker_release_address": (None, (_POINTER, _POINTER)),
    "ucp_worker_progress": (ctypes.c_uint, (_POINTER,)),
    "ucp_worker_signal": (_STATUS, (_POINTER,)),
    "ucp_mem_map": (_STATUS, (_POINTER, _POINTER, _OUT)),
    "ucp_mem_unmap": (_STATUS, (_POINTER, _POINTER)),
    "ucp_rkey_pack": (_STATUS, (_POINTER, _POINTER, _OUT, _OUT)),
    "ucp_rkey_buffer_release": (None, (_POINTER,)),
    "ucp_ep_rkey_unpack": (_STATUS, (_POINTER, ctypes.c_char_p, _OUT)),
    "ucp_rkey_destroy": (None, (_POINTER,)),
    "ucp_ep_create": (_STATUS, (_POINTER, _POINTER, _OUT)),
    "ucp_ep_close_nbx": (_POINTER, (_POINTER, _POINTER)),
    "ucp_ep_query": (_STATUS, (_POINTER, _POINTER)),
    "ucp_ep_flush_nbx": (_POINTER, (_POINTER, _POINTER)),
    "ucp_put_nbx": (_POINTER, _RMA),
    "ucp_get_nbx": (_POINTER, _RMA),
    "ucp_request_free": (None, (_POINTER,)),
    "ucs_status_string": (ctypes.c_char_p, (_STATUS,)),
}


class Library:
    """The library's functions, without the prefix; each releases the GIL.

    UCX's progress thread asks for the GIL while it holds the worker's lock: whoever waits for that lock must not hold
    the GIL. Only `check_status` keeps it: it reads a word of the request.
    """

    def __init__(self) -> None:
        mode = os.RTLD_NOLOAD | os.RTLD_NOW
        try:
            ucp, holding = ctypes.CDLL("libucp.so.0", mode=mode), ctypes.PyDLL("libucp.so.0", mode=mode)
        except OSError as exc:
            raise RuntimeError("libucp.so.0 is not loaded") from exc
        found = {name: _find(ucp, name, *signature) for name, signature in SIGNATURES.items()}
        self.worker_get_address = found["ucp_worker_get_address"]
        self.worker_release_address = found["ucp_worker_release_address"]
        self.worker_progress = found["ucp_worker_progress"]
        self.worker_signal = found["ucp_worker_signal"]
        self.mem_map = found["ucp_mem_map"]
        self.mem_unmap = found["ucp_mem_unmap"]
        self.rkey_pack = found["ucp_rkey_pack"]
        self.rkey_buffer_release = found["ucp_rkey_buffer_release"]
        self.ep_rkey_unpack = found["ucp_ep_rkey_unpack"]
        self.rkey_destroy = found["ucp_rkey_destroy"]
        self.ep_create = found["ucp_ep_create"]
        self.ep_close_nbx = found["ucp_ep_close_nbx"]
        self.ep_query = found["ucp_ep_query"]
        self.ep_flush_nbx = found["ucp_ep_flush_nbx"]
        self.put_nbx = found["ucp_put_nbx"]
        self.get_nbx = found["ucp_get_nbx"]
        self.request_free = found["ucp_request_free"]
        self.status_string = found["ucs_status_string"]
        self.check_status = _find(holding, "ucp_request_check_status", _STATUS, (_POINTER,))


def _find(dll: ctypes.CDLL, name: str, restype: Any, argtypes: tuple[Any, ...]) -> Any:
    try:
        function = dll[name]
    except AttributeError as exc:
        raise RuntimeError(f"this UCX has no {name}: it is older than 1.13") from exc
    function.restype = restype
    function.argtypes = argtypes
    return function


@functools.cache
def library() -> Library:
    """Return the library that `ucxx` has loaded, from wherever the user's UCX is.

    Raises:
        RuntimeError: none is loaded, or it is too old.
    """
    return Library()


def error_of(result: int) -> int:
    """Return the status in what a call returned that may return a request; 0 if it is one."""
    return result - (1 << 64) if result >= FIRST_ERROR else OK


def status_text(status: int) -> str:
    """Return UCX's words for a status."""
    return bytes(library().status_string(status)).decode(errors="replace")


def check(what: str, status: int) -> None:
    """Raise what UCX answered, unless it is OK."""
    if status != OK:
        raise RuntimeError(f"{what}: {status_text(status)}")
