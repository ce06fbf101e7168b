"""What torch's own sharding leaves on a rank is what the shards of its module say."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from loader_tools import numbered
from recorder_tools import infos_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, debug
from torch.testing._internal.distributed.fake_pg import FakeStore

from raynixl.errors import ConfigError
from raynixl.weights.dtensor import local_tensors, shards_of
from raynixl.weights.plan import plan
from raynixl.weights.shards import Shards, replicated
from raynixl.weights.tensors import describe

pytestmark = pytest.mark.pure

CLEAR = [getattr(debug, name) for name in dir(debug) if name.startswith("_clear") and "sharding_prop" in name]


@pytest.fixture
def rank_of():
    """Let this process be one rank of a world, with collectives that do nothing."""

    def start(rank, size):
        if dist.is_initialized():
            dist.destroy_process_group()
        for clear in CLEAR:  # torch remembers meshes of the rank that this process was before
            clear()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


class Layer(nn.Module):
    def __init__(self, values, *, tied=False):
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        if tied:
            self.tie = self.a


SHAPES = {"a": (10, 6), "b": (3, 4), "c": (7,), "s": (1,), "e": (2, 5, 4)}


def check(shards, model, values):
    """Each piece is that part of the full tensor, and all pieces of a local tensor are all of it."""
    local, pieces = local_tensors(model), shards.pieces
    seen = dict.fromkeys(local, 0)
    entries = shards.layout.entries
    for row in range(len(pieces)):
        full = values[shards.tensors[int(pieces.tensor[row])].name]
        name, dims = entries[int(pieces.entry[row])].name, full.dim()
        start, size = pieces.start[row].tolist()[:dims], pieces.size[row].tolist()[:dims]
        box = full[tuple(slice(at, at + count) for at, count in zip(start, size, strict=True))]
        flat = local[name].detach().contiguous().view(-1)
        got = flat.as_strided(size, pieces.stride[row].tolist()[:dims], int(pieces.offset[row]))
        assert torch.equal(got, box), name
        seen[name] += box.numel()
    assert seen == {name: tensor.numel() for name, tensor in local.items()}


def shard(model, mesh, placements):
    """Spread parameters over a mesh, each as its placements say."""
    for name, parameter in dict(model.named_parameters()).items():
        own = placements.get(name)
        if own is not None:
            spread = torch.distributed.tensor.distribute_tensor(parameter.data, mesh, own, src_data_rank=None)
            setattr(model, name, nn.Parameter(spread))
    return model


def fully(model, mesh):
    from torch.distributed.fsdp import fully_shard

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_fsdp2_shards_of_all_ranks_are_one_table_and_cover_the_model(rank_of, size):
    values = numbered(SHAPES)
    found = []
    for rank in range(size):
        rank_of(rank, size)
        model = fully(Layer(values), init_device_mesh("cpu", (size,), mesh_dim_names=("fsdp",)))
        found.append(shards_of(model))
        check(found[-1], model, values)
    assert len({shards.table.digest for shards in found}) == 1
    assert plan(found, [replicated(describe(values))]).nbytes[0] == sum(value.nbytes for value in values.values())


@pytest.mark.parametrize("rank", range(6))
def test_fsdp2_over_tensor_parallel_is_split_from_right_to_left(rank_of, rank):
    values = numbered(SHAPES)
    rank_of(rank, 6)
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
    model = shard(Layer(values), mesh["tp"], {"a": [Shard(0)], "b": [Shard(1)]})
    model = fully(model, mesh["dp"])
    shards = shards_of(model)
    check(shards, model, values)
    assert shards.table.ranks == 6
    for other in range(6):
        assert Shards(shards.table, other).pieces is not None


@pytest.mark.parametrize("rank", range(4))
def test_placements_on_meshes_of_two_dimensions(rank_of, rank):
    values = numbered(SHAPES)
    rank_of(rank, 4)
    mesh = init_device_mesh("cpu", (2, 2))
    placements = {
        "a": [Shard(0), Shard(1)],
        "b": [Shard(0), Shard(0)],
        "c": [Replicate(), Shard(0)],
        "e": [Shard(2), Replicate()],
    }
    model = shard(Layer(values), mesh, placements)
    check(shards_of(model), model, values)


@pytest.mark.parametrize("rank", range(4))
def test_experts_on_another_mesh_of_the_same_ranks(rank_of, rank):
    values = numbered(SHAPES)
    rank_of(rank, 4)
    model = shard(Layer(values), init_device_mesh("cpu", (4,), mesh_dim_names=("dp",)), {"a": [Shard(0)]})
    experts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    model = shard(model, experts, {"e": [Shard(1), Shard(0)]})
    check(shards_of(model), model, values)


def test_meshes_that_contradict_each_other_give_this_rank_a_table_of_its_own(rank_of):
    values = numbered(SHAPES)
    rank_of(3, 4)
    model = shard(Layer(values), init_device_mesh("cpu", (4,), mesh_dim_names=("x",)), {"a": [Shard(0)]})
    model = shard(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y")), {"b": [Shard(1), Shard(0)]})
    shards = shards_of(model)
    check(shards, model, values)
    assert shards.table.ranks == 1


def test_a_plain_module_is_whole():
    values = numbered(SHAPES)
    model = Layer(values)
    check(shards_of(model), model, values)
    assert shards_of(model).digest == replicated(describe(dict(model.state_dict()))).digest


def test_tied_parameters_lie_in_one_place(rank_of):
    values = numbered(SHAPES)
    rank_of(1, 2)
    model = fully(Layer(values, tied=True), init_device_mesh("cpu", (2,)))
    shards = shards_of(model)
    assert shards.layout.by_name["tie"].place == shards.layout.by_name["a"].place
    check(shards, model, values | {"tie": values["a"]})


def test_a_partial_sum_is_refused_by_name(rank_of):
    rank_of(0, 2)
    model = Layer(numbered({"a": (4,)}))
    spread = DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (2,)), [Partial()], run_check=False)
    model.a = nn.Parameter(spread)
    with pytest.raises(ConfigError, match=r"'a' is P.*a sum that is not done yet"):
        shards_of(model)


def test_a_local_part_that_its_placement_does_not_give_is_refused(rank_of):
    rank_of(0, 2)
    model = Layer(numbered({"a": (4,)}))
    mesh = init_device_mesh("cpu", (2,))
    spread = DTensor.from_local(torch.ones(3), mesh, [Shard(0)], run_check=False, shape=torch.Size([4]), stride=(1,))
    model.a = nn.Parameter(spread)
    with pytest.raises(ConfigError, match=r"has \[3\] of 'a'"):
        shards_of(model)


def test_infos_are_of_full_tensors(rank_of):
    values = numbered(SHAPES)
    rank_of(1, 2)
    model = fully(Layer(values), init_device_mesh("cpu", (2,)))
    assert list(shards_of(model).tensors) == infos_of(values)
