"""Streams, events, and copies on them. Thin, like `driver`; all of it needs a current context (`cuda.on(device)`)."""

from __future__ import annotations

from ctypes import byref, c_float, c_int, c_void_p

from raynixl.cuda.library import NOT_READY, call, check, failure

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: the user's default stream does not wait for it, nor it for that
_DISABLE_TIMING, _INTERPROCESS = 2, 4  # CU_EVENT_*


def stream_create(*, is_urgent: bool = False) -> int:
    """Return a new stream that runs beside the default one; an urgent one goes before others. To be destroyed."""
    least, greatest, stream = c_int(), c_int(), c_void_p()
    check("cuCtxGetStreamPriorityRange", byref(least), byref(greatest))
    priority = greatest.value if is_urgent else least.value
    check("cuStreamCreateWithPriority", byref(stream), _NON_BLOCKING, priority)
    return stream.value or 0


def stream_destroy(stream: int) -> None:
    """Give a stream back; what is on it still runs."""
    check("cuStreamDestroy_v2", stream)


def stream_query(stream: int) -> bool:
    """Whether all that was put on a stream is done."""
    return _is_ready("cuStreamQuery", stream)


def stream_synchronize(stream: int) -> None:
    """Wait for all that is on a stream, however long that takes: for setting up, for tools and for tests."""
    check("cuStreamSynchronize", stream)


def stream_wait_event(stream: int, event: int) -> None:
    """Have what comes next on a stream wait for what an event was recorded after. This thread does not wait."""
    check("cuStreamWaitEvent", stream, event, 0)


def stream_is_capturing(stream: int) -> bool:
    """Whether what is put on a stream goes into a CUDA graph."""
    status = c_int()
    check("cuStreamIsCapturing", stream, byref(status))
    return status.value != 0


def stream_context(stream: int) -> int:
    """Return the context that a stream belongs to."""
    context = c_void_p()
    check("cuStreamGetCtx", stream, byref(context), what="a stream", hint="give one that is alive")
    return context.value or 0


def event_create(*, is_shared: bool = False, is_timed: bool = False) -> int:
    """Return a new event, one that other processes can open or one that takes the time if so asked. To be destroyed."""
    event = c_void_p()
    flags = (0 if is_timed else _DISABLE_TIMING) | (_INTERPROCESS if is_shared else 0)
    check("cuEventCreate", byref(event), flags)
    return event.value or 0


def event_destroy(event: int) -> None:
    """Give an event back; streams that wait for it still do."""
    check("cuEventDestroy_v2", event)


def event_record(event: int, stream: int) -> None:
    """Have an event come after what is on a stream now."""
    check("cuEventRecord", event, stream)


def event_query(event: int) -> bool:
    """Whether what an event was recorded after is done."""
    return _is_ready("cuEventQuery", event)


def event_synchronize(event: int) -> None:
    """Wait for an event, however long that takes: for tools and tests."""
    check("cuEventSynchronize", event)


def event_elapsed_ms(first: int, second: int) -> float:
    """Return the milliseconds between two timed events that are done."""
    elapsed = c_float()
    check("cuEventElapsedTime", byref(elapsed), first, second)
    return elapsed.value


def memcpy_async(destination: int, source: int, nbytes: int, stream: int) -> None:
    """Copy between GPUs, or pinned host memory and a GPU, after what is on the stream."""
    check("cuMemcpyAsync", destination, source, nbytes, stream, what=f"{nbytes} bytes")


def memcpy_h2d_async(destination: int, source: int, nbytes: int, stream: int) -> None:
    """Copy from host memory, which must be pinned and stay as it is until done, to a GPU."""
    check("cuMemcpyHtoDAsync_v2", destination, source, nbytes, stream, what=f"{nbytes} bytes")


def memcpy_d2h_async(destination: int, source: int, nbytes: int, stream: int) -> None:
    """Copy from a GPU to host memory, which must be pinned."""
    check("cuMemcpyDtoHAsync_v2", destination, source, nbytes, stream, what=f"{nbytes} bytes")


def memcpy_d2d_async(destination: int, source: int, nbytes: int, stream: int) -> None:
    """Copy between memory of GPUs that the current context reaches."""
    check("cuMemcpyDtoDAsync_v2", destination, source, nbytes, stream, what=f"{nbytes} bytes")


def memcpy_peer_async(
    destination: int, destination_context: int, source: int, source_context: int, nbytes: int, stream: int
) -> None:
    """Copy between memory of two GPUs, whether they reach each other's or not."""
    check(
        "cuMemcpyPeerAsync", destination, destination_context, source, source_context, nbytes, stream,
        what=f"{nbytes} bytes",
    )  # fmt: skip


def _is_ready(name: str, handle: int) -> bool:
    code = call(name, handle)
    if code not in (0, NOT_READY):
        raise failure(code, name)
    return code == 0
