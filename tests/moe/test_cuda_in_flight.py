"""What is under way on GPUs that are made up: nothing that it uses is written anew, unmapped or freed meanwhile."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import moe_cuda
import pytest
import torch
from agent_tools import eventually
from moe_cuda_crews import OPTIONS, TOKENS, GpuCrew, gpu_crew, tokens

from raynixl import cuda
from raynixl.moe.cuda_layer import GpuLayer

WORLD, HELD_SECONDS = 2, 0.3


class Kernels:
    """Kernels of all ranks: how many run of each layer, and whether those that end an operation are held up."""

    def __init__(self) -> None:
        self.running: Counter[int] = Counter()
        self.layers: set[int] = set()
        self.freed: list[int] = []
        self.lock = threading.Lock()  # protects the numbers
        self.may_end = threading.Event()
        self.may_end.set()
        self._run = moe_cuda.run_kernel
        self.wrong: list[str] = []

    def run(self, name: str, grid: int, threads: int, arguments: Any) -> None:
        with self.lock:
            self.running[arguments.layer] += 1
        try:
            if name.endswith(("take", "sum")):
                assert self.may_end.wait(30)
            self._run(name, grid, threads, arguments)
        finally:
            with self.lock:
                self.running[arguments.layer] -= 1

    def hold(self) -> None:
        """Hold them up for a while."""
        self.may_end.clear()
        threading.Timer(HELD_SECONDS, self.may_end.set).start()

    def note(self, layer: int, what: str) -> None:
        """Note what is done to a layer while its kernels run."""
        if self.running[layer]:
            self.wrong.append(what)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    made, renew, close, start = Kernels(), GpuLayer.renew, cuda.Arena.close, GpuLayer._warm_up

    def watched_start(layer: GpuLayer) -> None:
        made.layers.add(layer.address)
        start(layer)

    def watched_renew(layer: GpuLayer, *arguments: Any) -> None:
        made.note(layer.address, "a layer was written anew")
        renew(layer, *arguments)

    def watched_close(arena: cuda.Arena) -> None:
        made.note(arena.address, "a layer was freed")
        if arena.address in made.layers:
            made.freed.append(arena.address)
        close(arena)

    monkeypatch.setattr(moe_cuda, "run_kernel", made.run)
    monkeypatch.setattr(GpuLayer, "_warm_up", watched_start)
    monkeypatch.setattr(GpuLayer, "renew", watched_renew)
    monkeypatch.setattr(cuda.Arena, "close", watched_close)
    return made


@pytest.fixture
def crew(kernels: Kernels) -> Iterator[GpuCrew]:
    with gpu_crew(WORLD, is_patient=False) as made:
        yield made


def one_step(crew: GpuCrew, ep: Any, rank: int) -> Any:
    """A step in fixed slots, which nobody waits for; what it returned."""
    given = tokens(rank)
    crew.gpus.kept.extend(given)  # as torch would keep them
    r = ep.dispatch(*given, layout="slots")
    return r, ep.combine(r.x, r.handle)


def settled_step(crew: GpuCrew, ep: Any, rank: int) -> None:
    """A step that has ended."""
    one_step(crew, ep, rank)
    crew.gpus.settle()


def captured_step(crew: GpuCrew, ep: Any, rank: int) -> Any:
    """A step in a graph."""
    settled_step(crew, ep, rank)
    work, stream = crew.gpus.fake.work, crew.gpus.stream()
    work.begin_capture(stream)
    kept = one_step(crew, ep, rank)
    return work.end_capture(stream), kept


@pytest.mark.parametrize("is_graph", [False, True], ids=["calls", "graph"])
def test_an_agreement_comes_after_what_is_under_way(crew: GpuCrew, kernels: Kernels, is_graph: bool) -> None:
    with crew.experts(WORLD, **OPTIONS) as layer:

        def work(rank: int, ep: Any) -> Any:
            graph, kept = captured_step(crew, ep, rank) if is_graph else (None, settled_step(crew, ep, rank))
            kernels.hold()
            kept = kept, graph.launch() if is_graph else one_step(crew, ep, rank)
            ep.synchronise()
            settled_step(crew, ep, rank)
            return kept

        layer.run(work)
    assert kernels.wrong == []


@pytest.mark.parametrize("is_graph", [False, True], ids=["calls", "graph"])
def test_a_layer_is_closed_behind_what_is_under_way(crew: GpuCrew, kernels: Kernels, is_graph: bool) -> None:
    with crew.experts(WORLD, **OPTIONS) as layer:

        def work(rank: int, ep: Any) -> Any:
            graph, kept = captured_step(crew, ep, rank) if is_graph else (None, settled_step(crew, ep, rank))
            kernels.hold()
            kept = kept, graph.launch() if is_graph else one_step(crew, ep, rank)
            ep.close()
            return kept

        layer.run(work)
        assert kernels.wrong == []


def test_gates_stay_entered_while_work_is_being_put_and_until_it_is_through(crew: GpuCrew, kernels: Kernels) -> None:
    with crew.experts(WORLD, **OPTIONS) as layer:
        layer.run(lambda rank, ep: settled_step(crew, ep, rank))
        presence = layer.eps[0]._path._layer.presence
        (gate,) = presence._gates.values()
        eventually(lambda: gate.inflight == 0, "the gate is left once the work is through")
        presence.enter()
        presence._look()
        assert gate.inflight == 1, "nothing has been put yet, and may be at any moment"

        def put(rank: int, ep: Any) -> Any:
            kernels.hold()
            kept = one_step(crew, ep, rank)
            if rank == 0:
                presence._look()
                assert gate.inflight == 1
            return kept

        kept = layer.run(put)
        eventually(lambda: gate.inflight == 0, "the gate is left")
        assert len(kept) == WORLD


def test_what_a_graph_has_captured_stays_when_windows_grow(crew: GpuCrew, kernels: Kernels) -> None:
    with crew.experts(WORLD, **OPTIONS) as layer:

        def work(rank: int, ep: Any) -> Any:
            graph, kept = captured_step(crew, ep, rank)
            given, beside = tokens(rank), torch.ones(TOKENS, 900)
            crew.gpus.kept.extend((*given, beside))
            longer = ep.dispatch(*given, layout="tokens", extra=(beside,))
            crew.gpus.settle()
            graph.launch()
            crew.gpus.settle()
            return kept, longer

        assert len(layer.run(work)) == WORLD
        assert kernels.freed == [], "a replay would run in what is somebody else's"
    assert kernels.wrong == []
