"""Weight loaders after the manner of inference engines: fused, tensor and expert parallel, padded, tied."""

from __future__ import annotations

import torch
from torch import nn


class Parallel:
    """The rank that a layer is built for."""

    def __init__(self, rank=0, size=1, expert_rank=0, expert_size=1):
        self.rank, self.size = rank, size
        self.expert_rank, self.expert_size = expert_rank, expert_size


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


class Replicated(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = parameter(*shape)
        self.weight.weight_loader = self.load

    def load(self, param, loaded):
        if param.numel() == 1 and loaded.numel() == 1:
            param.data.fill_(loaded.item())
            return
        assert param.size() == loaded.size()
        param.data.copy_(loaded)


class Column(nn.Module):
    """Rows split over the ranks, several full tensors one under the other."""

    def __init__(self, inputs, outputs, at, *, bias=False):
        super().__init__()
        self.at, self.outputs = at, outputs
        self.weight = parameter(sum(outputs) // at.size, inputs)
        self.weight.weight_loader = self.load
        if bias:
            self.bias = parameter(sum(outputs) // at.size)
            self.bias.weight_loader = self.load

    def load(self, param, loaded, shard_id=None):
        if shard_id is None:  # fused on disk: every part by itself
            offset = 0
            for number, size in enumerate(self.outputs):
                self.load(param, loaded.narrow(0, offset, size), number)
                offset += size
            return
        offset = sum(self.outputs[:shard_id]) // self.at.size
        size = self.outputs[shard_id] // self.at.size
        place = param.data.narrow(0, offset, size)
        loaded = loaded.narrow(0, self.at.rank * size, size)
        assert place.shape == loaded.shape
        place.copy_(loaded)


class Attention(Column):
    """Heads of queries, keys and values; heads of keys and values are copied when they are fewer than ranks."""

    def __init__(self, inputs, head, heads, kv_heads, at, *, bias=False):
        self.head, self.heads = head, heads // at.size
        self.kv_heads = max(1, kv_heads // at.size)
        self.copies = max(1, at.size // kv_heads)
        super().__init__(inputs, [heads * head] + [self.kv_heads * at.size * head] * 2, at, bias=bias)

    def load(self, param, loaded, shard_id=None):
        offset = {"q": 0, "k": self.heads, "v": self.heads + self.kv_heads}[shard_id] * self.head
        size = (self.heads if shard_id == "q" else self.kv_heads) * self.head
        shard = self.at.rank if shard_id == "q" else self.at.rank // self.copies
        loaded = loaded.narrow(0, shard * size, size)
        param.data[offset : offset + size] = loaded


class Row(nn.Module):
    """Columns split over the ranks."""

    def __init__(self, inputs, outputs, at):
        super().__init__()
        self.at = at
        self.weight = parameter(outputs, inputs // at.size)
        self.weight.weight_loader = self.load

    def load(self, param, loaded):
        size = param.shape[1]
        param.data.copy_(loaded[:, self.at.rank * size : (self.at.rank + 1) * size].to(param.device))


class Vocabulary(nn.Module):
    """Rows split over the ranks, padded."""

    def __init__(self, rows, width, at, *, multiple=8):
        super().__init__()
        self.at, self.rows = at, rows
        padded = -(-rows // (multiple * at.size)) * multiple
        self.weight = parameter(padded, width)
        self.weight.weight_loader = self.load

    def load(self, param, loaded):
        per = param.shape[0]
        first = min(self.at.rank * per, self.rows)
        loaded = loaded.narrow(0, first, min(per, self.rows - first))
        param[: loaded.shape[0]].data.copy_(loaded)
        param[loaded.shape[0] :].data.fill_(0)


class Experts(nn.Module):
    """Stacked experts: those of this rank, each split over the ranks of tensor parallelism."""

    def __init__(self, experts, width, inner, at):
        super().__init__()
        self.at = at
        own = experts // at.expert_size
        self.map = torch.full((experts,), -1, device="cpu")
        self.map[at.expert_rank * own : (at.expert_rank + 1) * own] = torch.arange(own, device="cpu")
        self.w13_weight = parameter(own, 2 * inner // at.size, width)
        self.w2_weight = parameter(own, width, inner // at.size)
        self.w13_scale = parameter(own, 2)
        for param in self.parameters():
            param.weight_loader = self.load

    def load(self, param, loaded, shard_id, expert):
        expert = self.map[expert].item()
        if expert == -1:
            return
        if param is self.w13_scale:
            param.data[expert][{"w1": 0, "w3": 1}[shard_id]] = loaded
            return
        data = param.data[expert]
        if shard_id == "w2":
            size = data.shape[1]
            data.copy_(loaded.narrow(1, self.at.rank * size, size))
        else:
            size = data.shape[0] // 2
            loaded = loaded.narrow(0, self.at.rank * size, size)
            data.narrow(0, 0 if shard_id == "w1" else size, size).copy_(loaded)


class Block(nn.Module):
    def __init__(self, sizes, at):
        super().__init__()
        width, inner = sizes["width"], sizes["inner"]
        self.norm = Replicated(width)
        self.qkv_proj = Attention(width, sizes["head"], sizes["heads"], sizes["kv_heads"], at, bias=True)
        self.o_proj = Row(sizes["head"] * sizes["heads"], width, at)
        if sizes["experts"]:
            self.gate = Replicated(sizes["experts"], width)
            self.experts = Experts(sizes["experts"], width, inner, at)
        else:
            self.gate_up_proj = Column(width, [inner, inner], at)
            self.down_proj = Row(inner, width, at)


STACKED = [
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
]


class Engine(nn.Module):
    """A small model of the kind of Llama, Qwen or Mixtral on one rank."""

    def __init__(self, sizes, at):
        super().__init__()
        self.sizes = sizes
        self.embed = Vocabulary(sizes["rows"], sizes["width"], at)
        self.layers = nn.ModuleList(Block(sizes, at) for _ in range(sizes["layers"]))
        self.head = Vocabulary(sizes["rows"], sizes["width"], at)
        if sizes["tied"]:
            self.head.weight = self.embed.weight

    def load_weights(self, weights):
        params, loaded_names = dict(self.named_parameters(remove_duplicate=False)), set()
        for name, loaded in weights:
            if "rotary" in name:
                continue
            found = name if ".experts." in name else self._load_plain(params, name, loaded)
            if ".experts." in name:
                self._load_expert(params, name, loaded)
            loaded_names.add(found)
        return loaded_names

    def _load_plain(self, params, name, loaded):
        for fused, part, shard_id in STACKED:
            if f".{part}." in name:
                name = name.replace(part, fused)
                params[name].weight_loader(params[name], loaded, shard_id)
                return name
        if self.sizes["tied"] and name == "head.weight":
            return name
        loader = params[name].weight_loader
        loader(params[name], loaded)
        return name

    def _load_expert(self, params, name, loaded):
        prefix, rest = name.split(".experts.")
        expert, shard_id, kind = rest.split(".")
        param = params[f"{prefix}.experts.{'w2' if shard_id == 'w2' else 'w13'}_{kind}"]
        param.weight_loader(param, loaded, shard_id=shard_id, expert=int(expert))


def checkpoint(sizes):
    """The full tensors of such a model, in the names of its checkpoint; every element has its own value."""
    width, inner, head = sizes["width"], sizes["inner"], sizes["head"]
    shapes = {"embed.weight": (sizes["rows"], width)}
    for layer in range(sizes["layers"]):
        at = f"layers.{layer}."
        shapes[at + "norm.weight"] = (width,)
        shapes[at + "rotary.inv_freq"] = (head // 2,)
        for part, heads in (("q", sizes["heads"]), ("k", sizes["kv_heads"]), ("v", sizes["kv_heads"])):
            shapes[f"{at}{part}_proj.weight"] = (heads * head, width)
            shapes[f"{at}{part}_proj.bias"] = (heads * head,)
        for part in () if sizes["experts"] else ("gate", "up"):
            shapes[f"{at}{part}_proj.weight"] = (inner, width)
        if not sizes["experts"]:
            shapes[at + "down_proj.weight"] = (width, inner)
        shapes[at + "o_proj.weight"] = (width, sizes["heads"] * head)
        if sizes["experts"]:
            shapes[at + "gate.weight"] = (sizes["experts"], width)
        for expert in range(sizes["experts"]):
            for part in ("w1", "w3", "w2"):
                shapes[f"{at}experts.{expert}.{part}.weight"] = (width, inner) if part == "w2" else (inner, width)
            shapes[f"{at}experts.{expert}.w1.scale"] = ()
            shapes[f"{at}experts.{expert}.w3.scale"] = (1,)
    shapes["head.weight"] = (sizes["rows"], width)
    return numbered(shapes)


def numbered(shapes, dtype=torch.float32):
    """Tensors of these shapes in which every element has its own value."""
    values, first = {}, 1
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        values[name] = torch.arange(first, first + count).to(dtype).reshape(shape)
        first += count
    return values
