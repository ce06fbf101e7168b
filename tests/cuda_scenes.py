"""What the driver does, told once for the fake one and for the true one: so the fake is no better than CUDA is.

Each scene works through `raynixl.cuda` alone and looks at bytes by copying them into pinned memory. `Ask` has another
process do something: a function of this module whose name begins with `far_`.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from ctypes import byref, c_uint64
from typing import Any

import pytest

from raynixl import cuda
from raynixl.backends.nvlink_export import export
from raynixl.backends.nvlink_import import ImportCache
from raynixl.cuda.library import call, error_name
from raynixl.cuda.prototypes import Access, Location, Properties
from raynixl.errors import BackendUnavailable, ConfigError, RangeError
from raynixl.memory import Memory, MemoryKind, address_of

Ask = Callable[..., Any]
MIB = 1 << 20
TEXT = b"what the other process has written"
_KEPT: dict[str, Any] = {}
_FABRIC_SUPPORTED = 128


@contextmanager
def working() -> Any:
    """A stream of GPU 0, its context current."""
    with cuda.on(0):
        stream = cuda.stream_create()
        try:
            yield stream
        finally:
            cuda.stream_synchronize(stream)
            cuda.stream_destroy(stream)


def read(address: int, nbytes: int) -> bytes:
    """Bytes of a GPU."""
    with working() as stream:
        host = cuda.host_alloc(nbytes)
        cuda.memcpy_d2h_async(host, address, nbytes, stream)
        cuda.stream_synchronize(stream)
        found = bytes(cuda.host_bytes(host, nbytes))
        cuda.host_free(host)
    return found


def write(address: int, content: bytes) -> None:
    """Put bytes on a GPU."""
    with working() as stream:
        host = cuda.host_alloc(len(content))
        cuda.host_bytes(host, len(content))[:] = content
        cuda.memcpy_h2d_async(address, host, len(content), stream)
        cuda.stream_synchronize(stream)
        cuda.host_free(host)


def play(_world: Any, scene: str, fields: dict[str, Any]) -> Any:
    """Do the far part of a scene, in the far process of the GPU tests."""
    return globals()[scene](**fields)


def far_make(nbytes: int, offset: int, text: str) -> dict[str, Any]:
    """Make an arena in this process that holds some text, and return the key of its last bytes."""
    arena = _KEPT["arena"] = cuda.arena(nbytes, 0)
    write(arena.address + offset, text.encode())
    return export(Memory(MemoryKind.VRAM, 0, arena.address + offset, nbytes - offset, True, None))


def mapped(sizes: Sequence[int], handle_types: int) -> tuple[int, int]:
    """Map new chunks side by side; where, or 0 if the driver makes none of that type, and its code."""
    address, access = c_uint64(), Access(Location(1, 0), 3)
    wanted, at = Properties(type=1, handle_types=handle_types, location=Location(1, 0)), 0
    with cuda.on(0):
        assert call("cuMemAddressReserve", byref(address), sum(sizes), 0, 0, 0) == 0
        for size in sizes:
            chunk = c_uint64()
            if code := call("cuMemCreate", byref(chunk), size, byref(wanted), 0):
                assert call("cuMemAddressFree", address.value, sum(sizes)) == 0
                return 0, code
            assert call("cuMemMap", address.value + at, size, 0, chunk, 0) == 0
            assert call("cuMemRelease", chunk) == 0
            at += size
        assert call("cuMemSetAccess", address.value, at, byref(access), 1) == 0
    return address.value, 0


def unmap(address: int, nbytes: int) -> None:
    """Take all chunks away again."""
    with cuda.on(0):
        assert [call("cuMemUnmap", address, nbytes), call("cuMemAddressFree", address, nbytes)] == [0, 0]


def far_chunks(nbytes: int, offset: int, text: str) -> dict[str, Any]:
    """Make two chunks with fabric handles, and return the key of their last bytes; why not where there is no fabric."""
    if not cuda.device_attribute(0, _FABRIC_SUPPORTED):
        return {"skip": "this GPU has no fabric handles"}
    address, code = mapped((nbytes // 2, nbytes // 2), cuda.FABRIC)
    if code:
        return {"skip": f"the driver makes no chunk with a fabric handle: {error_name(code)}"}
    _KEPT["chunks"] = (address, nbytes)
    write(address + offset, text.encode())
    return export(Memory(MemoryKind.VRAM, 0, address + offset, nbytes - offset, True, None))


def far_read(nbytes: int) -> str:
    """Return what the last key's memory holds."""
    return read(_KEPT["arena"].address, nbytes).decode()


def far_remake() -> dict[str, Any]:
    """Free the arena and make one of the same size."""
    nbytes = _KEPT.pop("arena").nbytes
    gc.collect()
    arena = _KEPT["arena"] = cuda.arena(nbytes, 0)
    return export(Memory(MemoryKind.VRAM, 0, arena.address, nbytes, True, None))


def far_drop() -> None:
    """Let go of everything."""
    _KEPT.pop("arena", None)
    if "chunks" in _KEPT:
        unmap(*_KEPT.pop("chunks"))
    gc.collect()


def an_arena_is_zeroed_and_says_where_it_lies() -> None:
    arena = cuda.arena(3 * MIB, 0)
    assert read(arena.address, 3 * MIB) == bytes(3 * MIB)
    found = cuda.examine(arena.address + 5, MIB)
    assert (found.start, found.device, found.origin) == (arena.address, 0, cuda.Origin.MALLOC)
    assert found.nbytes >= 3 * MIB
    assert found.is_ipc_capable
    assert found.context == cuda.primary(0)
    assert cuda.left_from(arena.address + 5) == found.nbytes - 5
    with pytest.raises(RangeError, match="beyond its allocation"):
        cuda.examine(arena.address, found.nbytes + 1)


def memory_made_anew_has_another_id() -> None:
    ids, addresses = set(), []
    for _ in range(20):
        arena = cuda.arena(2 * MIB, 0)
        ids.add(cuda.examine(arena.address, 1).buffer_id)
        addresses.append(arena.address)
        arena.close()
    assert len(ids) == 20
    assert len(set(addresses)) < 20, "addresses are given again, which is why there are ids"


def errors_are_named() -> None:
    with cuda.on(0):
        with pytest.raises(RangeError, match=r"CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
            cuda.alloc(1 << 45)
        with pytest.raises(BackendUnavailable, match="cuIpcOpenMemHandle"):
            cuda.ipc_open(bytes(64))
    with pytest.raises(ConfigError, match="GPU 99"):
        cuda.primary(99)
    with pytest.raises(ConfigError, match="on no GPU"):
        cuda.examine(0x1000, 1)


def pinned_memory_is_known_and_counted() -> None:
    with mmap.mmap(-1, 16 * MIB) as mapping:
        address = address_of(mapping)
        assert cuda.pinned_address(address, 1) is None
        first, second = cuda.pin(address, 16 * MIB), cuda.pin(address, 16 * MIB)
        assert cuda.pinned_address(address, 16 * MIB) == first.device_address == second.device_address
        assert cuda.pinned_address(address + 100, 1) == first.device_address + 100
        first.close()
        arena = cuda.arena(16 * MIB, 0)
        mapping[-len(TEXT) :] = TEXT
        with working() as stream:
            cuda.memcpy_h2d_async(arena.address, address, 16 * MIB, stream)
        assert read(arena.address + 16 * MIB - len(TEXT), len(TEXT)) == TEXT
        second.close()
        assert cuda.pinned_address(address, 1) is None
    with cuda.on(0):
        host = cuda.host_alloc(MIB)
        assert cuda.pinned_address(host, MIB) == cuda.host_device_address(host)
        theirs = cuda.pin(host + 4096, 4096)
        theirs.close()
        assert cuda.pinned_address(host, MIB) is not None
        cuda.host_free(host)


def memory_that_is_pinned_in_part_is_refused_or_pinned_as_a_whole() -> None:
    with mmap.mmap(-1, 4 * MIB) as mapping:
        address = address_of(mapping)
        part = cuda.pin(address + MIB, MIB)
        with contextlib.suppress(ConfigError):
            whole = cuda.pin(address, 4 * MIB)  # driver 580 takes it
            assert cuda.pinned_address(address, 4 * MIB) == whole.device_address
            whole.close()
        part.close()
        cuda.pin(address, 4 * MIB).close()
        assert cuda.pinned_address(address + MIB, 1) is None


def streams_follow_events() -> None:
    first, second = cuda.arena(MIB, 0), cuda.arena(MIB, 0)
    with working() as one, working() as two:
        event = cuda.event_create(is_timed=True)
        began = cuda.event_create(is_timed=True)
        cuda.event_record(began, one)
        for value in range(50):
            cuda.memset_async(first.address, value, MIB, one)
        cuda.event_record(event, one)
        cuda.stream_wait_event(two, event)
        cuda.memcpy_d2d_async(second.address, first.address, MIB, two)
        cuda.stream_synchronize(two)
        assert cuda.event_query(event)
        assert cuda.stream_query(two)
        assert not cuda.stream_is_capturing(two)
        assert cuda.event_elapsed_ms(began, event) >= 0
        cuda.event_destroy(event)
        cuda.event_destroy(began)
    assert read(second.address, MIB) == b"\x31" * MIB


def the_users_default_stream_is_followed() -> None:
    for stream in (0, 1, 2):
        event = cuda.record(stream, 0)
        assert event.device == 0
        with cuda.on(0):
            cuda.event_synchronize(event.handle)
        assert event.query()
    with working() as stream:
        event = cuda.record(stream, 0)
        with cuda.on(0):
            cuda.event_synchronize(event.handle)
        assert event.query()


def memory_of_another_process_is_opened_once_and_shared(ask: Ask) -> None:
    cache, offset = ImportCache(), 3 * MIB + 7
    key = ask("far_make", nbytes=8 * MIB, offset=offset, text=TEXT.decode())
    one, two = cache.open(key, 5 * MIB - 7, 0), cache.open({**key, "offset": 0}, 8 * MIB, 0)
    assert one.address - two.address == offset
    assert len(cache) == 1
    assert read(one.address, len(TEXT)) == TEXT
    write(two.address, b"and back")
    assert ask("far_read", nbytes=8) == "and back"
    found = cuda.examine(one.address, 1)
    assert (found.start, found.device) == (two.address, 0)
    one.close()
    assert read(two.address + offset, len(TEXT)) == TEXT
    two.close()
    assert len(cache) == 0
    ask("far_drop")


def memory_that_is_no_longer_there_is_not_opened_and_its_successor_is_another(ask: Ask) -> None:
    cache = ImportCache()
    before = ask("far_make", nbytes=4 * MIB, offset=0, text="old")
    cache.open(before, 4 * MIB, 0).close()
    after = ask("far_remake")
    assert after["buffer"] != before["buffer"]
    again = cache.open(after, 4 * MIB, 0)
    assert read(again.address, 3) == bytes(3)
    again.close()
    ask("far_drop")
    with pytest.raises(BackendUnavailable, match="its owner has ended or freed it"):
        cache.open(after, 4 * MIB, 0)


def a_key_that_claims_more_than_there_is_is_refused(ask: Ask) -> None:
    key = ask("far_make", nbytes=2 * MIB, offset=0, text="x")
    cache = ImportCache()
    with pytest.raises(Exception, match="smaller than its key says"):
        cache.open({**key, "size": 64 * MIB}, 64 * MIB, 0)
    cache.open(key, 2 * MIB, 0).close()
    ask("far_drop")


def a_handle_is_not_opened_where_it_was_made() -> None:
    arena = cuda.arena(MIB, 0)
    with cuda.on(0), pytest.raises(BackendUnavailable, match="cuIpcOpenMemHandle"):
        cuda.ipc_open(cuda.ipc_export(arena.address))


def chunks_side_by_side_are_told_apart() -> None:
    sizes = (2 * MIB, 4 * MIB, 2 * MIB)
    address, code = mapped(sizes, 0)
    assert code == 0
    write(address + 2 * MIB - 3, b"across")
    assert read(address + 2 * MIB - 3, 6) == b"across"
    found = [cuda.piece_at(address + at) for at in (0, 2 * MIB - 1, 2 * MIB, 6 * MIB - 1, 6 * MIB)]
    first, second, third = (address, sizes[0]), (address + 2 * MIB, sizes[1]), (address + 6 * MIB, sizes[2])
    assert found == [first, first, second, second, third]
    assert cuda.examine(address, sum(sizes)).origin is cuda.Origin.VIRTUAL
    unmap(address, sum(sizes))


def chunks_on_a_fabric_are_mapped(ask: Ask) -> None:
    key = ask("far_chunks", nbytes=8 * MIB, offset=4 * MIB - 9, text=TEXT.decode())
    if "skip" in key:
        pytest.skip(str(key["skip"]))
    if "refusal" in key:
        pytest.skip(str(key["refusal"]))
    one = ImportCache().open(key, 4 * MIB, 0)
    assert read(one.address, len(TEXT)) == TEXT
    one.close()
    ask("far_drop")


ALONE = [
    an_arena_is_zeroed_and_says_where_it_lies, memory_made_anew_has_another_id, errors_are_named,
    pinned_memory_is_known_and_counted, memory_that_is_pinned_in_part_is_refused_or_pinned_as_a_whole,
    streams_follow_events, the_users_default_stream_is_followed, chunks_side_by_side_are_told_apart,
]  # fmt: skip
TOGETHER = [
    memory_of_another_process_is_opened_once_and_shared,
    memory_that_is_no_longer_there_is_not_opened_and_its_successor_is_another,
    a_key_that_claims_more_than_there_is_is_refused, chunks_on_a_fabric_are_mapped,
]  # fmt: skip
