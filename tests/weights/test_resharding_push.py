"""Pushes from any sharding to any other, through agents: what arrives is bit-equal to slices of the full tensors."""

import numpy as np
import pytest
import torch
from reshard_models import random_model, random_side
from reshard_tools import least_nbytes, locals_of, number_elements, values_of

from raynixl.errors import ConfigError
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.declare import Concat, declare
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.placement import Mesh, Replicate, Shard

SIGNED = {"uint8": np.uint8, "bfloat16": np.int16, "float32": np.int32, "int64": np.int64}
SECONDS = 30.0
MAX_RANKS = 9


def tensor_of(array, dtype):
    return torch.from_numpy(np.array(array).view(SIGNED[dtype])).view(getattr(torch, dtype))


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def local_model(shards, own, *, is_source):
    """The local tensors of a rank by name; tied ones are one tensor. Those of a target hold rubbish."""
    made = {}
    for entry in shards.layout.entries:
        value = tensor_of(values_of(own[entry.name], entry.dtype), entry.dtype)
        if not is_source:
            value.view(-1)[:] = 1
        made.setdefault(entry.place if entry.nbytes else entry.name, value)
    return {e.name: made[e.place if e.nbytes else e.name].view(e.shape) for e in shards.layout.entries}


def push_case(fleet, seed, install):
    """Push a random model from a random mesh to another; False if it takes too many agents."""
    rng = np.random.default_rng(seed)
    model = random_model(rng)
    ours = random_side(model, rng, is_tied=model.is_tied)
    theirs = random_side(model, rng, is_tied=model.is_tied)
    if ours.mesh.ranks + theirs.mesh.ranks > MAX_RANKS:
        return False
    ids = number_elements(model.infos, model.tied)
    sources, targets, nbytes = [], {}, 0
    for shards in ours.shards():
        own = locals_of(ours, ids, ours.mesh.coordinates()[shards.rank])
        if not own:
            continue  # a rank of a pipeline without layers publishes nothing
        agent = fleet(f"source-{seed}-{shards.rank}")
        publish(agent, "policy", local_model(shards, own, is_source=True), shards=shards, chunk_nbytes=4096)
        sources.append(agent)
    for shards in theirs.shards():
        own = locals_of(theirs, ids, theirs.mesh.coordinates()[shards.rank])
        if not own:
            continue
        agent = fleet(f"target-{seed}-{shards.rank}")
        mine = local_model(shards, own, is_source=False)
        subscribe(agent, "policy", mine, shards=shards, install=install)
        targets[agent.name] = (shards, own, mine)
        nbytes += least_nbytes(theirs, own)
    sync = WeightSync(sources[0], "policy", [agent.name for agent in sources], list(targets), topology="direct")
    report = sync.push(1, timeout=SECONDS)
    assert not report.excluded, report
    assert report.origin_nbytes == nbytes
    for shards, own, mine in targets.values():
        for entry in shards.layout.entries:
            if (own[entry.name] >= 0).any():
                wanted = values_of(own[entry.name], entry.dtype)
                assert bits(mine[entry.name]) == np.ascontiguousarray(wanted).tobytes(), entry.name
    return True


@pytest.mark.parametrize("install", ["swap", "copy"])
def test_random_meshes_of_agents_push_to_each_other(fleet, install):
    done, seed = 0, 0 if install == "swap" else 1000
    while done < 15:
        try:
            done += push_case(fleet, seed, install)
        except Exception as exc:
            raise AssertionError(f"case {seed}") from exc
        for agent in fleet.agents:
            agent.close()
        fleet.agents.clear()
        seed += 1


INFOS = [
    TensorInfo("embed", "bfloat16", (50, 16)),
    TensorInfo("q", "bfloat16", (32, 16)),
    TensorInfo("k", "bfloat16", (8, 16)),
    TensorInfo("v", "bfloat16", (8, 16)),
    TensorInfo("gate", "bfloat16", (24, 16)),
    TensorInfo("up", "bfloat16", (24, 16)),
    TensorInfo("down", "bfloat16", (16, 24)),
]


def full(seed=0):
    torch.manual_seed(seed)
    return {info.name: torch.randn(info.shape).bfloat16() for info in INFOS}


def fsdp(rank, ranks=2):
    return declare(INFOS, Mesh((("fsdp", ranks),)), (Shard(0),), (rank,))


def tp(rank):
    """A rank of two, as vLLM holds it: fused, and the vocabulary padded to 64."""
    placements = {info.name: (Shard(1 if info.name == "down" else 0),) for info in INFOS}
    placements |= {"q": (Shard(0, 4),), "k": (Shard(0, 1),), "v": (Shard(0, 1),)}
    fused = {"qkv": Concat(0, ("q", "k", "v")), "gate_up": Concat(0, ("gate", "up"))}
    return declare(INFOS, Mesh((("tp", 2),)), placements, (rank,), fused=fused, padded={"embed": (64, 16)})


def tp_values(values, rank):
    half = {name: tensor.chunk(2)[rank] for name, tensor in values.items()}
    padded = torch.cat((values["embed"], torch.zeros(14, 16).bfloat16()))
    return {
        "embed": padded.chunk(2)[rank], "qkv": torch.cat((half["q"], values["k"], values["v"])),
        "gate_up": torch.cat((half["gate"], half["up"])), "down": values["down"].chunk(2, dim=1)[rank],
    }  # fmt: skip


def empty(shards):
    return {
        entry.name: torch.full(entry.shape, 7.0, dtype=getattr(torch, entry.dtype)) for entry in shards.layout.entries
    }


def start_sources(fleet, values, *, replicas=1):
    """Publish two ranks of FSDP, in so many replicas; return what they hold and their names."""
    held, names = [], []
    for copy in range(replicas):
        for rank in range(2):
            own = {name: tensor.chunk(2)[rank].clone() for name, tensor in values.items()}
            agent = fleet(f"trainer-{copy}-{rank}")
            publish(agent, "policy", own, shards=fsdp(rank), chunk_nbytes=4096)
            held.append((rank, own))
            names.append(agent.name)
    return held, names


@pytest.mark.parametrize("install", ["swap", "copy"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_fsdp_ranks_and_their_replicas_feed_fused_and_padded_ranks_of_tensor_parallelism(fleet, install, replicas):
    held, names = start_sources(fleet, full(), replicas=replicas)
    targets = [empty(tp(rank)) for rank in range(2)]
    for rank, target in enumerate(targets):
        subscribe(fleet(f"rollout-{rank}"), "policy", target, shards=tp(rank), install=install)
    sync = WeightSync(fleet.agents[0], "policy", names, [["rollout-0", "rollout-1"]], timeout=SECONDS)
    for version in (1, 2, 3):
        values = full(version)
        for rank, own in held:
            for name, tensor in own.items():
                tensor.copy_(values[name].chunk(2)[rank])
        assert not sync.push(version).excluded
        for rank, target in enumerate(targets):
            for name, wanted in tp_values(values, rank).items():
                assert torch.equal(target[name], wanted), (version, rank, name)


def cut(target):
    target["qkv"] = target["qkv"][1:].clone()


@pytest.mark.parametrize("change", [lambda target: target.pop("qkv"), cut], ids=["missing", "of another shape"])
def test_shards_that_are_not_what_the_model_has_are_refused_at_once(fleet, change):
    target = empty(tp(0))
    change(target)
    agent = fleet("rollout")
    with pytest.raises(ConfigError, match="qkv"):
        subscribe(agent, "policy", target, shards=tp(0))
    subscribe(agent, "policy", empty(tp(0)), shards=tp(0)).close()


def test_adapters_alone_are_pushed_where_both_ends_select_them(fleet):
    def model(value):
        return {"a.base": torch.full((4, 4), value), "a.lora_A": torch.full((2, 4), value)}

    source, target = model(3.0), model(0.0)
    publish(fleet("trainer"), "policy", source, select="*.lora_*")
    subscribe(fleet("rollout"), "policy", target, select="*.lora_*")
    report = WeightSync(fleet.agents[0], "policy", ["trainer"], ["rollout"], timeout=SECONDS).push(1)
    assert report.origin_nbytes == 32
    assert target["a.lora_A"].eq(3).all()
    assert target["a.base"].eq(0).all()


@pytest.mark.parametrize("install", ["swap", "copy"])
def test_weights_are_cast_at_the_source_into_targets_of_that_dtype(fleet, install):
    source = {"w": torch.randn(33, 65), "steps": torch.arange(5)}
    target = {"w": torch.zeros(33, 65, dtype=torch.bfloat16), "steps": torch.zeros(5, dtype=torch.int64)}
    publish(fleet("trainer"), "policy", source, cast="bfloat16")
    subscribe(fleet("rollout"), "policy", target, install=install)
    assert not WeightSync(fleet.agents[0], "policy", ["trainer"], ["rollout"], timeout=SECONDS).push(1).excluded
    assert torch.equal(target["w"], source["w"].bfloat16())
    assert torch.equal(target["steps"], source["steps"])


def test_weights_are_quantised_at_the_source_into_targets_with_scales(fleet):
    source = {"up.weight": torch.randn(256, 384)}
    target = {
        "up.weight": torch.zeros(256, 384).to(torch.float8_e4m3fn),
        "up.weight_scale_inv": torch.zeros(2, 3),
    }
    publish(fleet("trainer"), "policy", source, quantise="fp8")
    subscribe(fleet("rollout"), "policy", target)
    assert not WeightSync(fleet.agents[0], "policy", ["trainer"], ["rollout"], timeout=SECONDS).push(1).excluded
    scales = target["up.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    found = target["up.weight"].float() * scales
    assert (found - source["up.weight"]).abs().max() <= source["up.weight"].abs().max() / 16


class Engine(torch.nn.Module):
    """Loads q and k into one parameter, and squares what it must therefore get whole."""

    def __init__(self):
        super().__init__()
        self.qk = torch.nn.Parameter(torch.zeros(12, 8), requires_grad=False)
        self.square = torch.nn.Parameter(torch.zeros(5, 5), requires_grad=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "square":
                self.square.data.copy_(tensor @ tensor)
            else:
                self.qk.data.narrow(0, 0 if name == "q" else 8, tensor.shape[0]).copy_(tensor)


@pytest.mark.parametrize("install", ["swap", "copy"])
def test_a_recorded_loader_runs_at_install_over_what_it_must_get_whole(fleet, install):
    source = {"q": torch.randn(8, 8), "k": torch.randn(4, 8), "square": torch.randn(5, 5)}
    engine = Engine()
    publish(fleet("trainer"), "policy", source)
    subscribe(fleet("rollout"), "policy", engine, record=engine.load_weights, install=install)
    sync = WeightSync(fleet.agents[0], "policy", ["trainer"], ["rollout"], timeout=SECONDS)
    for version in (1, 2, 3):
        source["q"].add_(1)
        source["square"].mul_(2)
        assert not sync.push(version).excluded
        assert torch.equal(engine.qk, torch.cat((source["q"], source["k"])))
        assert torch.equal(engine.square, source["square"] @ source["square"])


def test_a_loader_is_recorded_once_for_a_source_and_anew_for_a_changed_engine(fleet):
    source = {"q": torch.randn(8, 8), "k": torch.randn(4, 8)}
    engine, runs = Engine(), []

    def load(weights):
        runs.append(True)
        engine.load_weights(weights)

    publish(fleet("trainer"), "policy", source)
    subscribe(fleet("rollout"), "policy", engine, record=load)
    for version in (1, 2, 3):  # whoever pushes anew asks anew what targets need
        sync = WeightSync(fleet.agents[0], "policy", ["trainer"], ["rollout"], timeout=SECONDS)
        source["q"].add_(1)
        assert not sync.push(version).excluded
        assert torch.equal(engine.qk, torch.cat((source["q"], source["k"])))
    assert len(runs) == 1
    engine.qk = torch.nn.Parameter(torch.zeros(12, 8), requires_grad=False)
    sync = WeightSync(fleet.agents[0], "policy", ["trainer"], ["rollout"], timeout=SECONDS)
    assert not sync.push(4).excluded
    assert torch.equal(engine.qk, torch.cat((source["q"], source["k"])))
    assert len(runs) == 2


def test_a_replicated_source_feeds_ranks_of_any_mesh(fleet):
    values = full()
    publish(fleet("trainer"), "policy", values, shards=declare(INFOS, Mesh((("dp", 1),)), (Replicate(),), (0,)))
    target = empty(tp(1))
    subscribe(fleet("rollout"), "policy", target, shards=tp(1))
    assert not WeightSync(fleet.agents[0], "policy", ["trainer"], ["rollout"], timeout=SECONDS).push(1).excluded
    assert all(torch.equal(target[name], wanted) for name, wanted in tp_values(values, 1).items())
