"""What a trainer tells vLLM's workers: plain values, which need no vLLM."""

import importlib
import json
import tomllib
from pathlib import Path

import pytest
import torch

from raynixl.actors.process import Place
from raynixl.errors import ConfigError
from raynixl.integrations.vllm import init_info, register, worker_names


class _Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(8, 4, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = torch.nn.LayerNorm(4)


@pytest.fixture
def cluster(monkeypatch):
    place = Place("10.0.0.1:6379", "session_1", "01000000", "", "node", "", "", "", "")
    monkeypatch.setattr("raynixl.actors.process.here", lambda: place)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_names_and_kinds_of_all_tensors_travel_as_json(cluster, device):
    with torch.device(device):
        info = init_info("policy", _Tied())
    assert set(json.loads(json.dumps(info))["tensors"]) == {
        "embedding.weight",
        "head.weight",
        "norm.weight",
        "norm.bias",
    }
    assert info["tensors"]["embedding.weight"] == ("bfloat16", [8, 4])
    assert info["tensors"]["norm.bias"] == ("float32", [4])
    assert (info["gcs"], info["session"], info["job"]) == ("10.0.0.1:6379", "session_1", "01000000")


def test_workers_are_named_for_the_weights_or_as_one_likes(cluster):
    assert init_info("policy", _Tied())["workers"] == "policy"
    assert init_info("policy", _Tied(), workers="engine-2")["workers"] == "engine-2"
    assert worker_names("engine-2", 2) == ["engine-2-vllm-0", "engine-2-vllm-1"]


def test_versions_land_in_host_memory_unless_another_is_named(cluster):
    assert init_info("policy", _Tied())["memory"] == "dram"
    assert init_info("policy", _Tied(), memory="vram")["memory"] == "vram"


def test_without_ray_it_is_said_what_is_missing(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="there is no Ray here"):
        init_info("policy", _Tied())


def test_the_entry_point_that_vllm_looks_for_names_what_registers_the_backend():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["raynixl"].split(":")
    assert getattr(importlib.import_module(module), function) is register
