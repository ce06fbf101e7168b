"""The CUDA driver, without a runtime: memory of GPUs and what is known of it, streams, events, kernels.

Nothing is loaded before it is needed. CUDA is initialised by `devices`, `primary`, `on` and what makes something on
a GPU, never by asking about memory. There is no call here that waits for a whole GPU.
"""

from raynixl.cuda.arena import (
    Arena,
    Event,
    Pin,
    arena,
    close_kept,
    pin,
    record,
    stream_device,
    stream_handle,
)
from raynixl.cuda.chunks import Chunk, MappedChunks, export_chunks
from raynixl.cuda.contexts import (
    Device,
    bus_id,
    current,
    current_functions,
    device_attribute,
    device_here,
    device_of_context,
    devices,
    enable_peer,
    function_address,
    let_go,
    on,
    primary,
    relaxed,
)
from raynixl.cuda.driver import (
    alloc,
    free,
    host_alloc,
    host_bytes,
    host_device_address,
    host_free,
    host_register,
    host_unregister,
    ipc_close,
    ipc_export,
    ipc_export_event,
    ipc_open,
    ipc_open_event,
    memory_info,
    memset_async,
)
from raynixl.cuda.kernels import launch, module_function, module_load, module_unload
from raynixl.cuda.library import failure, give_back, has_driver, kept, replace_driver
from raynixl.cuda.pointers import (
    FABRIC,
    POSIX_FD,
    Allocation,
    Origin,
    context_for,
    device_of,
    examine,
    left_from,
    piece_at,
    pinned_address,
)
from raynixl.cuda.prototypes import HANDLE_NBYTES
from raynixl.cuda.streams import (
    event_create,
    event_destroy,
    event_elapsed_ms,
    event_query,
    event_record,
    event_synchronize,
    memcpy_async,
    memcpy_d2d_async,
    memcpy_d2h_async,
    memcpy_h2d_async,
    memcpy_peer_async,
    stream_create,
    stream_destroy,
    stream_is_capturing,
    stream_query,
    stream_synchronize,
    stream_wait_event,
)

__all__ = [
    "FABRIC", "HANDLE_NBYTES", "POSIX_FD", "Allocation", "Arena", "Chunk", "Device", "Event", "MappedChunks",
    "Origin", "Pin", "alloc", "arena", "bus_id", "close_kept", "context_for", "current", "current_functions",
    "device_attribute", "device_here", "device_of", "device_of_context", "devices", "enable_peer", "event_create",
    "event_destroy", "event_elapsed_ms", "event_query", "event_record", "event_synchronize", "examine",
    "export_chunks", "failure", "free", "function_address", "give_back", "has_driver", "host_alloc", "host_bytes",
    "host_device_address", "host_free", "host_register", "host_unregister", "ipc_close", "ipc_export",
    "ipc_export_event", "ipc_open", "ipc_open_event", "kept", "launch", "left_from", "let_go", "memcpy_async",
    "memcpy_d2d_async", "memcpy_d2h_async", "memcpy_h2d_async", "memcpy_peer_async", "memory_info",
    "memset_async", "module_function", "module_load", "module_unload", "on", "piece_at", "pin", "pinned_address",
    "primary", "record", "relaxed", "replace_driver", "stream_create", "stream_destroy", "stream_device",
    "stream_handle", "stream_is_capturing", "stream_query", "stream_synchronize", "stream_wait_event",
]  # fmt: skip
