"""Keys of memory on a GPU: what travels, and what cannot be exported and why."""

from __future__ import annotations

import pytest
from cuda_fake import FakeCuda

from raynixl import cuda
from raynixl.backends.nvlink_export import MOST_CHUNKS, export, why_not_exported
from raynixl.backends.ucx_gpu import why_slow
from raynixl.cuda import FABRIC, POSIX_FD, Allocation, Origin
from raynixl.errors import ConfigError, RangeError
from raynixl.memory import Memory, MemoryKind

MIB = 1 << 20


def vram(address: int, nbytes: int = 1000, device: int = 0) -> Memory:
    """Memory on a made-up GPU."""
    return Memory(MemoryKind.VRAM, device, address, nbytes, True, None)


def test_a_key_names_the_allocation_and_where_the_memory_lies_in_it(fake_cuda: FakeCuda):
    arena = cuda.arena(3 * MIB, 1)
    whole, part = export(vram(arena.address, 3 * MIB)), export(vram(arena.address + 4096))
    assert whole == {**part, "offset": 0}
    assert (part["offset"], part["size"]) == (4096, 4 * MIB)
    assert part["uuid"] == cuda.devices()[1].uuid
    assert len(str(part["handle"])) == 128
    assert fake_cuda.devices.stack == []


def test_memory_that_was_freed_and_made_anew_has_another_key(fake_cuda: FakeCuda):
    address = fake_cuda.make(MIB)
    before = export(vram(address))
    fake_cuda.drop(address)
    assert fake_cuda.make(MIB) == address
    assert export(vram(address))["buffer"] != before["buffer"]


@pytest.mark.parametrize(
    ("origin", "handle_types", "setting"),
    [
        (Origin.VIRTUAL, 0, "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"),
        (Origin.VIRTUAL, POSIX_FD, "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"),
        (Origin.POOL, FABRIC, "PYTORCH_CUDA_ALLOC_CONF=backend:native"),
        (Origin.MANAGED, 0, "cudaMalloc"),
    ],
)
def test_memory_that_cannot_be_exported_says_so_and_what_to_set(
    fake_cuda: FakeCuda, origin: Origin, handle_types: int, setting: str
):
    address = fake_cuda.make(MIB, origin=origin, handle_types=handle_types)
    key = export(vram(address))
    assert set(key) == {"uuid", "process", "buffer", "refusal"}
    assert origin.value in str(key["refusal"])
    assert setting in str(key["refusal"])
    slow = why_slow(Allocation(0, 0, address, MIB, origin), (1, 21))
    assert setting in slow, "what UCX does not reach is mended in the same way"


def test_memory_that_the_driver_says_is_not_capable_is_not_exported(fake_cuda: FakeCuda):
    assert "kind='vram'" in why_not_exported(Allocation(0, 0, 4096, MIB, Origin.MALLOC, is_ipc_capable=False))
    assert why_not_exported(Allocation(0, 0, 4096, MIB, Origin.MALLOC)) == ""


def test_a_driver_that_refuses_a_handle_makes_a_refusal(fake_cuda: FakeCuda):
    fake_cuda.fail("cuIpcGetMemHandle", 801)
    refusal = str(export(vram(fake_cuda.make(MIB)))["refusal"])
    assert "CUDA_ERROR_NOT_SUPPORTED" in refusal
    fake_cuda.fail("cuIpcGetMemHandle", 1)
    assert "CUDA_ERROR_INVALID_VALUE" in str(export(vram(fake_cuda.make(MIB)))["refusal"])


def test_chunks_with_fabric_handles_are_exported_in_order(fake_cuda: FakeCuda):
    address = fake_cuda.make(0, origin=Origin.VIRTUAL, handle_types=FABRIC, chunks=(2 * MIB, 4 * MIB, 2 * MIB))
    key = export(vram(address + 3 * MIB, 4 * MIB))
    assert key["chunks"] == f"{4 * MIB},{2 * MIB}"
    assert len(str(key["fabric"])) == 2 * 128
    assert (key["offset"], key["size"]) == (MIB, 6 * MIB)
    assert fake_cuda.leaks() == []


def test_memory_of_too_many_chunks_is_refused(fake_cuda: FakeCuda):
    sizes = (2 * MIB,) * (MOST_CHUNKS + 1)
    address = fake_cuda.make(0, origin=Origin.VIRTUAL, handle_types=FABRIC, chunks=sizes)
    refusal = str(export(vram(address, sum(sizes)))["refusal"])
    assert "more than 16 chunks" in refusal
    assert "expandable_segments:False" in refusal
    assert "refusal" not in export(vram(address, sum(sizes[1:])))


def test_a_driver_without_a_fabric_makes_a_refusal(fake_cuda: FakeCuda):
    fake_cuda.chunks.exports_fabric = False
    address = fake_cuda.make(2 * MIB, origin=Origin.VIRTUAL, handle_types=FABRIC)
    refusal = str(export(vram(address))["refusal"])
    assert "nvidia-imex" in refusal
    assert "expandable_segments:False" in refusal
    assert fake_cuda.leaks() == []


def test_memory_that_is_gone_has_no_key(fake_cuda: FakeCuda):
    address = fake_cuda.make(MIB)
    with pytest.raises(RangeError, match="beyond its allocation"):
        export(vram(address, MIB + 1))
    fake_cuda.drop(address)
    with pytest.raises(ConfigError, match="on no GPU"):
        export(vram(address))
