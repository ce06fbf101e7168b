"""Ours on a GPU in the MoE benchmark, on one that is made up."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_cuda_crews import GpuCrew, gpu_crew

from raynixl import Group
from raynixl.bench.moe import MoeSpec
from raynixl.bench.moe_gpu import GpuWay, gathers, mps_runs
from raynixl.bench.moe_load import Load, Tokens, is_received, is_result, make_tokens
from raynixl.errors import ConfigError


@pytest.fixture(scope="module")
def crew() -> Iterator[GpuCrew]:
    with gpu_crew(3) as made:
        yield made


@pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])
def test_it_brings_the_right_rows_and_sums(crew: GpuCrew, layout: str) -> None:
    load = Load(3, 10, 64, 3, 8, layout=layout, memory="vram")

    def run(rank: int) -> list[bool]:
        with Group(crew.agents[rank], crew.names, name=f"bench-{layout}") as group:
            way, found = GpuWay(group, load, is_graph=False), []
            for seed in (1, 2):
                tokens = make_tokens(load, rank, seed)
                way.dispatch(tokens)
                found.append(is_received(load, rank, way.received(), seed))
                way.compute()
                found.append(is_result(load, way.combine(), tokens, is_exact=True))
            floors = gathers(load, rank, tokens)
            floors["index_select"]()
            way.close()
        return found

    assert crew.run([lambda rank=rank: run(rank) for rank in range(3)]) == [[True] * 4] * 3


def test_a_graph_that_is_replayed_brings_what_other_tokens_and_experts_give(
    crew: GpuCrew, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, work = Load(3, 10, 64, 3, 8, layout="slots", memory="vram"), crew.gpus.fake.work

    class Graph:
        captured: Any = None

        def replay(self) -> None:
            self.captured.launch()

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        stream = crew.gpus.stream()
        work.begin_capture(stream)
        yield
        graph.captured = work.end_capture(stream)

    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", capture)

    def fixed(load: Load, rank: int, seed: int) -> Tokens:
        made = make_tokens(load, rank, seed)
        return Tokens(
            made.x, made.ids, torch.full(made.weights.shape, 0.25)
        )  # torch copies them, which nobody captures here

    monkeypatch.setattr("raynixl.bench.moe_load.make_tokens", fixed)

    def run(rank: int) -> list[bool]:
        with Group(crew.agents[rank], crew.names, name="bench-graph") as group:
            way, found = GpuWay(group, load, is_graph=True), []
            for seed in (1, 2, 3):
                tokens = fixed(load, rank, seed)
                way.dispatch(tokens)
                found.append(is_received(load, rank, way.received(), seed))
                way.compute()
                found.append(is_result(load, way.combine(), tokens, is_exact=True))
            way.close()
        return found

    assert crew.run([lambda rank=rank: run(rank) for rank in range(3)]) == [[True] * 6] * 3


def test_memory_of_a_gpu_is_refused_where_there_is_none_and_beside_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="choose of: dram, vram"):
        MoeSpec(memory="disk").check()
    with pytest.raises(ConfigError, match="baselines take memory of the host"):
        MoeSpec(memory="vram", baselines=("gloo",)).check()
    with pytest.raises(ConfigError, match="needs torch with CUDA"):
        MoeSpec(memory="vram").check()


def test_mps_runs_while_its_daemon_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("raynixl.bench.moe_gpu._MPS", tmp_path)
    assert not mps_runs()
    (tmp_path / "control").touch()
    assert mps_runs(), "its files are all that is known of a daemon that names no process"
    (tmp_path / "nvidia-cuda-mps-control.pid").write_text(f"{os.getpid()}\n", encoding="utf-8")
    assert mps_runs()
    ended = subprocess.Popen(["true"])
    ended.wait(30)
    (tmp_path / "nvidia-cuda-mps-control.pid").write_text(f"{ended.pid}", encoding="utf-8")
    assert not mps_runs(), "its files stay when it has ended"
