"""Actors that Ray gives GPUs, parts of one, or none: each sees its own as GPU 0, and they reach each other's memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ray
from actor_tools import get

import raynixl as rx

pytestmark = [pytest.mark.ray, pytest.mark.pure]
Make = Callable[..., Any]
N = 1 << 16


class _Worker:
    """Has memory on a made-up GPU of those that Ray lets it see."""

    def __init__(self) -> None:
        import cuda_fake
        import cuda_kernels

        self.seen = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
        visible = tuple(int(one) for one in self.seen.split(",") if one.isdecimal())
        self.fake = cuda_fake.install(visible=visible)
        cuda_kernels.register(self.fake)
        self.regions: dict[str, Any] = {}

    def look(self) -> str:
        """The agent's name and what Ray has set."""
        return self.seen

    def calls(self) -> int:
        """How often CUDA was called so far."""
        return int(self.fake.calls.total())

    def make(self, kind: str, value: int) -> str:
        """Make a region that is full of a value; return the agent's name."""
        from raynixl.testing.contents import put

        region = self.regions[kind] = rx.agent().empty(N, kind=kind, name=kind)
        put(region.memory, np.full(N, value, np.uint8))
        return rx.agent().name

    def move(self, op: str, ours: str, peer: str, theirs: str) -> tuple[str, str]:
        """Read or write all of a peer's region; return the path, or the error and no path."""
        mine, remote = self.regions[ours], rx.agent().peer(peer)[theirs]
        pair = (remote, mine) if op == "read" else (mine, remote)
        try:
            getattr(rx.agent(), op)(*pair).wait()
        except rx.RaynixlError as exc:
            return "", f"{type(exc).__name__}: {exc}"
        told = rx.agent().explain(*pair)
        return f"{told.backend} {' '.join(told.paths)}", ""

    def values(self, kind: str) -> list[int]:
        """Which bytes a region has."""
        from raynixl.testing.contents import get as content

        return np.unique(content(self.regions[kind].memory)).tolist()

    def broadcast(self, kind: str, members: list[str], root: int) -> list[int]:
        """Take part in a broadcast; return which bytes there are then."""
        with rx.Group(rx.agent(), members, timeout=30.0) as group:
            group.broadcast(self.regions[kind], root)
        return self.values(kind)


def _kind() -> Any:
    @ray.remote(num_cpus=0)
    @rx.worker(config=rx.AgentConfig(backends=("shm", "nvlink")))
    class Worker(_Worker):
        """The decorated actor: made here, so that it travels as it is."""

    return Worker


@pytest.fixture
def worker(make: Make) -> Callable[[float], Any]:
    """Make an actor that has so many GPUs."""
    kind = _kind()
    return lambda gpus: make(kind, options={"num_gpus": gpus} if gpus else {})


def test_actors_on_parts_of_one_gpu_reach_each_others_memory(worker: Callable[[float], Any]) -> None:
    one, other = worker(0.5), worker(0.5)
    assert get([one.look.remote(), other.look.remote()]) in (["0", "0"], ["1", "1"])
    assert get([one.calls.remote(), other.calls.remote()]) == [0, 0], "an agent that meets no GPU starts no CUDA"
    name, _ = get([one.make.remote("vram", 7), other.make.remote("vram", 0)])
    assert get(other.move.remote("read", "vram", name, "vram")) == ("nvlink ipc", "")
    assert get(other.values.remote("vram")) == [7]


def test_actors_on_two_gpus_call_each_its_own_the_first(worker: Callable[[float], Any]) -> None:
    actors = [worker(1), worker(1)]
    assert sorted(get([actor.look.remote() for actor in actors])) == ["0", "1"]
    names = get([actor.make.remote("vram", 3 + number) for number, actor in enumerate(actors)])
    assert get(actors[0].move.remote("read", "vram", names[1], "vram")) == ("nvlink ipc", "")
    assert get(actors[0].values.remote("vram")) == [4]
    shared = [actor.broadcast.remote("vram", names, 0) for actor in actors]
    assert get(shared) == [[4], [4]]


def test_an_actor_without_a_gpu_is_reached_by_one_that_has_one_and_told_why_it_does_not_reach_that(
    worker: Callable[[float], Any],
) -> None:
    rich, poor = worker(1), worker(0)
    assert get(poor.look.remote()) in ("", "none")
    rich_name, poor_name = get([rich.make.remote("vram", 5), poor.make.remote("dram", 0)])
    path, error = get(poor.move.remote("read", "dram", rich_name, "vram"))
    assert path == ""
    assert "this process sees no GPU" in error
    assert get(rich.move.remote("write", "vram", poor_name, "dram")) == ("nvlink pinned", "")
    assert get(poor.values.remote("dram")) == [5]
    with pytest.raises(ray.exceptions.RayTaskError, match="CUDA_VISIBLE_DEVICES"):
        get(poor.make.remote("vram", 1))
