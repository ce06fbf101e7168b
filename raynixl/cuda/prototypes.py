"""The functions of the CUDA driver that we call, and the types of their arguments, as cuda.h has them."""

from __future__ import annotations

from ctypes import Structure, c_char, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ushort, c_void_p
from typing import Any

HANDLE_NBYTES = 64
"""Handles of memory and of events, of CUDA IPC and of a fabric: all of this size."""


class Handle(Structure):
    """CUipcMemHandle, CUipcEventHandle and CUmemFabricHandle, which are passed by value."""

    _fields_ = (("data", c_char * HANDLE_NBYTES),)


class Location(Structure):
    """CUmemLocation."""

    _fields_ = (("type", c_int), ("id", c_int))


class Access(Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", c_int))


class Properties(Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int), ("handle_types", c_int), ("location", Location), ("win32", c_void_p),
        ("compression", c_ubyte), ("is_rdma_capable", c_ubyte), ("usage", c_ushort), ("reserved", c_ubyte * 4),
    )  # fmt: skip


_OUT = c_void_p  # a pointer to what the function fills in: byref of it
_CONTEXT = _STREAM = _EVENT = _FUNCTION = _MODULE = _HOST = c_void_p
_DEVICE, _ADDRESS, _CHUNK = c_int, c_uint64, c_uint64

PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, _OUT),
    "cuDeviceGet": (_OUT, c_int),
    "cuDeviceGetCount": (_OUT,),
    "cuDeviceGetUuid_v2": (_OUT, _DEVICE),
    "cuDeviceGetPCIBusId": (_OUT, c_int, _DEVICE),
    "cuDeviceGetAttribute": (_OUT, c_int, _DEVICE),
    "cuDevicePrimaryCtxRetain": (_OUT, _DEVICE),
    "cuDeviceCanAccessPeer": (_OUT, _DEVICE, _DEVICE),
    "cuCtxPushCurrent_v2": (_CONTEXT,),
    "cuCtxPopCurrent_v2": (_OUT,),
    "cuCtxGetCurrent": (_OUT,),
    "cuCtxSetCurrent": (_CONTEXT,),
    "cuCtxGetDevice": (_OUT,),
    "cuCtxEnablePeerAccess": (_CONTEXT, c_uint),
    "cuCtxGetStreamPriorityRange": (_OUT, _OUT),
    "cuPointerGetAttribute": (_OUT, c_int, _ADDRESS),
    "cuMemAlloc_v2": (_OUT, c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemGetInfo_v2": (_OUT, _OUT),
    "cuMemsetD8Async": (_ADDRESS, c_ubyte, c_size_t, _STREAM),
    "cuIpcGetMemHandle": (_OUT, _ADDRESS),
    "cuIpcOpenMemHandle_v2": (_OUT, Handle, c_uint),
    "cuIpcCloseMemHandle": (_ADDRESS,),
    "cuIpcGetEventHandle": (_OUT, _EVENT),
    "cuIpcOpenEventHandle": (_OUT, Handle),
    "cuMemHostAlloc": (_OUT, c_size_t, c_uint),
    "cuMemFreeHost": (_HOST,),
    "cuMemHostRegister_v2": (_HOST, c_size_t, c_uint),
    "cuMemHostUnregister": (_HOST,),
    "cuMemHostGetDevicePointer_v2": (_OUT, _HOST, c_uint),
    "cuMemRetainAllocationHandle": (_OUT, c_void_p),
    "cuMemRelease": (_CHUNK,),
    "cuMemCreate": (_OUT, c_size_t, c_void_p, c_uint64),
    "cuMemExportToShareableHandle": (_OUT, _CHUNK, c_int, c_uint64),
    "cuMemImportFromShareableHandle": (_OUT, c_void_p, c_int),
    "cuMemAddressReserve": (_OUT, c_size_t, c_size_t, _ADDRESS, c_uint64),
    "cuMemAddressFree": (_ADDRESS, c_size_t),
    "cuMemMap": (_ADDRESS, c_size_t, c_size_t, _CHUNK, c_uint64),
    "cuMemUnmap": (_ADDRESS, c_size_t),
    "cuMemSetAccess": (_ADDRESS, c_size_t, c_void_p, c_size_t),
    "cuStreamCreateWithPriority": (_OUT, c_uint, c_int),
    "cuStreamDestroy_v2": (_STREAM,),
    "cuStreamQuery": (_STREAM,),
    "cuStreamSynchronize": (_STREAM,),
    "cuStreamWaitEvent": (_STREAM, _EVENT, c_uint),
    "cuThreadExchangeStreamCaptureMode": (_OUT,),
    "cuStreamIsCapturing": (_STREAM, _OUT),
    "cuStreamGetCtx": (_STREAM, _OUT),
    "cuEventCreate": (_OUT, c_uint),
    "cuEventDestroy_v2": (_EVENT,),
    "cuEventRecord": (_EVENT, _STREAM),
    "cuEventQuery": (_EVENT,),
    "cuEventSynchronize": (_EVENT,),
    "cuEventElapsedTime": (_OUT, _EVENT, _EVENT),
    "cuMemcpyAsync": (_ADDRESS, _ADDRESS, c_size_t, _STREAM),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _HOST, c_size_t, _STREAM),
    "cuMemcpyDtoHAsync_v2": (_HOST, _ADDRESS, c_size_t, _STREAM),
    "cuMemcpyDtoDAsync_v2": (_ADDRESS, _ADDRESS, c_size_t, _STREAM),
    "cuMemcpyPeerAsync": (_ADDRESS, _CONTEXT, _ADDRESS, _CONTEXT, c_size_t, _STREAM),
    "cuModuleLoadData": (_OUT, c_void_p),
    "cuModuleUnload": (_MODULE,),
    "cuModuleGetFunction": (_OUT, _MODULE, c_void_p),
    "cuLaunchKernel": (_FUNCTION, *[c_uint] * 7, _STREAM, c_void_p, c_void_p),
}
"""By name: what `cuLaunchKernel` and the others take. All return a code, 0 if it went well."""
