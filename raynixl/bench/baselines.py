"""The baselines of the transfer benchmark: by name, made once for a run, and asked to contend on each scene."""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from raynixl.bench import copies
from raynixl.bench.layout import Bytes
from raynixl.bench.pages import user_memory
from raynixl.bench.scene import Contender, Scene
from raynixl.bench.spec import CUDA_BASELINES, TransferSpec
from raynixl.memory import map_shared


class Baseline(Protocol):
    """Something to compare with."""

    def contend(self, scene: Scene) -> list[Contender]:
        """Return what to measure on a scene; it is done with before the next scene comes."""

    def close(self) -> None:
        """Let go of processes and threads; idempotent."""


class Memcpy:
    """Plain memcpy into the target's very memory, or into a stand-in for it."""

    def __init__(self, spec: TransferSpec) -> None:
        self._team = copies.ThreadTeam.start(spec.threads)

    def contend(self, scene: Scene) -> list[Contender]:
        """Copy from ours to theirs, or back."""
        there, is_theirs = reach(scene)
        source, target = (scene.ours, there) if scene.is_write else (there, scene.ours)
        runner = copies.memcpy(scene.layout, source, target, self._team)

        def run() -> object:
            return runner.sample(1)

        return [Contender(runner, lambda: scene.check(run) if is_theirs else scene.check_here(run, there))]

    def close(self) -> None:
        """Join the threads."""
        self._team.close()


class ProcessVm:
    """Bare process_vm calls between our memory and the target's."""

    def __init__(self, spec: TransferSpec) -> None:
        self._team = copies.ThreadTeam.start(spec.threads)

    def contend(self, scene: Scene) -> list[Contender]:
        """Move the very bytes that ours moves."""
        place = copies.Foreign(scene.pid, scene.far["address"])
        runner = copies.process_vm(scene.layout, scene.ours, place, is_write=scene.is_write, team=self._team)
        return [Contender(runner, lambda: scene.check(lambda: runner.sample(1)))]

    def close(self) -> None:
        """Join the threads."""
        self._team.close()


def reach(scene: Scene) -> tuple[Bytes, bool]:
    """Return the target's memory as mapped here, or plain memory here in its place; and whether it is theirs."""
    nbytes, number = scene.layout.nbytes, scene.far["fd"]
    if number < 0:
        return user_memory(nbytes), False
    fd = os.open(f"/proc/{scene.pid}/fd/{number}", os.O_RDWR)
    try:
        mapping: mmap.mmap = map_shared(fd, nbytes)
    finally:
        os.close(fd)
    return np.frombuffer(mapping, np.uint8, nbytes), True


def _perftest(spec: TransferSpec) -> Baseline:
    from raynixl.bench.perftest import Perftest

    return Perftest(spec)


def _cuda(spec: TransferSpec, name: str) -> Baseline:
    from raynixl.bench.gpu import CudaMemcpy

    return CudaMemcpy(spec, name)


def _nixl(spec: TransferSpec) -> Baseline:
    from raynixl.bench.nixl import Nixl

    return Nixl(spec)


def _stream(spec: TransferSpec) -> Baseline:
    from raynixl.bench.stream import Stream

    return Stream(spec)


MAKERS: Mapping[str, Callable[[TransferSpec], Baseline]] = {
    "memcpy": Memcpy,
    "process_vm": ProcessVm,
    "ucx_perftest": _perftest,
    "nixl": _nixl,
    "socket": _stream,
    **{name: functools.partial(_cuda, name=name) for name in CUDA_BASELINES},
}
