"""What users with a GPU get wrong ends in a message that says what to do."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from agent_tools import KIB, error_of, introduce
from vram_tools import gpu_agent, make_region

from raynixl import Agent, BackendUnavailable, ConfigError, RaynixlError
from raynixl.cuda import Origin

N = 4 * KIB


class Foreign:
    """Memory of a GPU that another library has made."""

    def __init__(self, address: int, **face: Any) -> None:
        self.__cuda_array_interface__ = {
            "version": 3, "typestr": "|u1", "shape": (N,), "data": (address, False), **face,
        }  # fmt: skip


@pytest.fixture
def near(gpus: Any) -> Iterator[Agent]:
    """An agent that has nvlink."""
    with gpu_agent("near") as agent:
        yield agent


@pytest.mark.parametrize("device", [-1, "0", "cuda:1", 1.5, True, None, 1 << 40, 2])
def test_a_device_that_is_none_is_named(near: Agent, device: Any) -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        near.empty(N, kind="vram", device=device)


def test_a_device_may_be_any_whole_number(near: Agent) -> None:
    region = near.empty(N, kind="vram", device=np.int64(1))
    assert (region.device, type(region.device)) == (1, int)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_told_of(near: Agent) -> None:
    with pytest.raises(ConfigError, match=r"built without CUDA.*install a torch with CUDA"):
        near.empty(N, kind="vram").tensor(torch.uint8, (N,))


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="cupy is here")
def test_without_cupy_it_is_said_what_to_install(near: Agent) -> None:
    with pytest.raises(BackendUnavailable, match="pip install"):
        near.empty(N, kind="vram").cupy()


@pytest.mark.parametrize("kind", ["empty", "register"])
def test_memory_of_a_gpu_that_no_backend_takes_names_the_setting(gpus: Any, kind: str) -> None:
    with gpu_agent("near", backends=("shm",)) as near:
        address = gpus.make(N)
        with pytest.raises(BackendUnavailable, match=r"nvlink or ucx in AgentConfig\(backends="):
            near.empty(N, kind="vram") if kind == "empty" else near.register(Foreign(address))
        gpus.drop(address)


def test_without_kernels_transfers_say_what_to_install(gpus: Any, near: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise BackendUnavailable("there is no compiler for kernels of GPUs", hint="pip install 'raynixl[cu13]'")

    monkeypatch.setattr("raynixl.backends.nvlink_kernel.image_for", refuse)
    with gpu_agent("far") as far:
        introduce(near, far)
        make_region(far, "arena", N, name="theirs")
        error = error_of(near.read(near.peer("far")["theirs"], near.empty(N, kind="vram")))
    assert isinstance(error, BackendUnavailable)
    assert "pip install 'raynixl[cu13]'" in str(error)


@pytest.mark.parametrize(
    ("origin", "setting"), [(Origin.VIRTUAL, "expandable_segments:False"), (Origin.POOL, "backend:native")]
)
def test_memory_that_others_cannot_map_names_the_setting_of_torch(
    gpus: Any, near: Agent, origin: Origin, setting: str
) -> None:
    address = gpus.make(N, origin=origin)
    region = near.register(Foreign(address))
    assert setting in str(region.keys["nvlink"]["refusal"])
    near.deregister(region)
    gpus.drop(address)


@pytest.mark.parametrize(
    "wrong",
    [
        {"strides": (2,)}, {"data": (0x1234000, False)}, {"shape": (0,)}, {"shape": (1 << 40,)},
    ],
    ids=["strided", "no memory", "empty", "beyond its end"],
)  # fmt: skip
def test_what_is_no_memory_of_a_gpu_is_refused(gpus: Any, near: Agent, wrong: dict[str, Any]) -> None:
    region = near.empty(N, kind="vram")
    with pytest.raises(RaynixlError) as refused:
        near.register(Foreign(region.memory.address, **wrong))
    assert refused.value.hint
    assert near.statistics().regions == 1


@pytest.mark.parametrize("tensor", [torch.zeros(4, device="meta"), torch.zeros(4, 4)[:, ::2]], ids=["meta", "strided"])
def test_tensors_that_cannot_be_registered_say_what_would_do(near: Agent, tensor: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        near.register(tensor)
    assert refused.value.hint
