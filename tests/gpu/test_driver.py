"""The true driver does what the fake one says: the scenes of tests/cuda/test_scenes.py, and views by torch and cupy."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cuda_scenes
import numpy as np
import pytest
from gpu_tools import Fars, has_cuda_torch

from raynixl import cuda
from raynixl.errors import ConfigError
from raynixl.memory import address_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]
BACKENDS = ["nvlink", "shm"]


@pytest.mark.parametrize(
    "scene",
    [*cuda_scenes.ALONE, cuda_scenes.a_handle_is_not_opened_where_it_was_made],
    ids=lambda scene: scene.__name__,
)
def test_alone(scene: Callable[[], None]) -> None:
    scene()


@pytest.mark.parametrize("scene", cuda_scenes.TOGETHER, ids=lambda scene: scene.__name__)
def test_with_another_process(fars: Fars, scene: Callable[..., None]) -> None:
    far = fars(backends=BACKENDS)
    scene(lambda do, **fields: far.ask("cuda_scenes:play", scene=do, fields=fields))


def test_an_arena_is_viewed_by_cupy_and_torch() -> None:
    import cupy

    arena = cuda.arena(1 << 20, 0)
    view = cupy.asarray(arena)
    assert view.data.ptr == arena.address
    assert not view.get().any()
    view.set(np.full(1 << 20, 3, np.uint8))  # no kernel of cupy's to compile
    cupy.cuda.Stream.null.synchronize()
    assert cuda_scenes.read(arena.address, 4) == b"\3\3\3\3"
    if has_cuda_torch():
        import torch

        tensor = torch.as_tensor(arena, device="cuda:0")
        assert tensor.data_ptr() == arena.address
        assert int(tensor.cpu()[-1]) == 3


def test_gpus_are_who_cupy_says_they_are() -> None:
    import cupy

    for one in cuda.devices():
        theirs: Any = cupy.cuda.runtime.getDeviceProperties(one.index)["uuid"]
        assert bytes(theirs).hex() == one.uuid


def test_memory_of_allocators_is_known_for_what_it_is() -> None:
    import cupy

    pool = cupy.cuda.malloc_async(1 << 20)
    assert cuda.examine(pool.ptr, 1 << 20).origin is cuda.Origin.POOL
    managed = cupy.cuda.malloc_managed(1 << 20)
    assert cuda.examine(managed.ptr, 1 << 20).origin is cuda.Origin.MANAGED
    plain = cupy.cuda.Memory(1 << 20)
    assert cuda.examine(plain.ptr, 1 << 20).origin is cuda.Origin.MALLOC
    pinned = cupy.cuda.alloc_pinned_memory(1 << 20)
    assert cuda.pinned_address(pinned.ptr, 1 << 20) is not None


def test_memory_that_is_none_has_no_handle() -> None:
    with cuda.on(0), pytest.raises(ConfigError, match="cuIpcGetMemHandle"):
        cuda.ipc_export(0x1000)


def test_what_we_do_breaks_no_graph_that_somebody_captures() -> None:
    import cupy

    event, numbers, stream = cuda.record(0, 0), cupy.zeros(100), cupy.cuda.Stream(non_blocking=True)
    numbers += 1  # compiled before

    def disturb() -> None:
        assert event.query()
        cuda.arena(1 << 20, 0).close()
        with mmap.mmap(-1, 1 << 20) as mapping:
            cuda.pin(address_of(mapping), 1 << 20).close()

    with stream, ThreadPoolExecutor(1) as pool:
        stream.begin_capture()
        numbers += 1
        pool.submit(disturb).result(30)
        graph = stream.end_capture()
    graph.launch(stream)
    stream.synchronize()
    assert float(numbers[0]) == 2.0
