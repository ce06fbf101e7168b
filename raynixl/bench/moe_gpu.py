"""Ours on a GPU in the MoE benchmark, also replayed from CUDA graphs, and the floor: a copy of the same rows there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raynixl.bench.moe_load import Load, Received, Tokens, run_expert, run_experts
from raynixl.bench.moe_own import rows_of_pairs
from raynixl.config import from_env
from raynixl.moe import cuda_device
from raynixl.moe.routing import route
from raynixl.native import load as load_core

if TYPE_CHECKING:
    import torch

    from raynixl.collectives import Group

GRAPH = "raynixl-graph"
_MPS = Path("/tmp/nvidia-mps")
"""Where its daemon is found unless CUDA_MPS_PIPE_DIRECTORY says otherwise."""


def mps_runs() -> bool:
    """Whether processes share the GPU by MPS; otherwise they take turns, and who waits for another holds its turn."""
    try:
        pid = int((_MPS / "nvidia-cuda-mps-control.pid").read_text())
    except OSError:
        return (_MPS / "control").exists()
    except ValueError:
        return False
    return Path(f"/proc/{pid}").exists()  # its files stay when it ends


class GpuWay:
    """raynixl's expert parallelism on tensors of the first GPU; a step has ended when the GPU is through."""

    def __init__(self, group: Group, load: Load, *, is_graph: bool) -> None:
        from raynixl.moe.parallel import ExpertParallel

        self._load, self._rank, self._is_graph = load, group.rank, is_graph
        self._gpu = cuda_device.gpu(0)
        self._parallel = ExpertParallel(
            group, experts=load.experts, hidden=load.hidden, topk=load.topk, max_tokens=load.tokens,
            dtype=load.torch_dtype, placement=load.holders().tolist(), name=f"gpu-{load.tokens}-{is_graph}",
        )  # fmt: skip
        self._tokens: tuple[int, Any] = (0, None)
        self._dispatched: Any = None
        self._y: Any = None
        self._out: Any = None
        self._graphs: tuple[Any, Any] | None = None

    def dispatch(self, tokens: Tokens) -> None:
        """Bring rows, ids and weights to the ranks that hold the experts."""
        given = self._on_gpu(tokens)
        if self._graphs is not None:
            self._graphs[0].replay()
        else:
            self._dispatched = self._parallel.dispatch(*given, layout=self._load.layout)
        self._gpu.finish()

    def received(self) -> Received:
        """Return what came, in order of source and token, in memory of the host."""
        made = self._dispatched
        x, ids, weights = made.x, made.topk_idx, made.topk_weights
        if self._load.layout == "slots":
            there = made.tokens >= 0
            x, ids, weights = x[there], ids[there], weights[there]
        elif self._load.layout == "experts":
            x, weights = rows_of_pairs(made)
        return Received(*(self._gpu.fetch(one) for one in (x, ids, weights, made.counts)))

    def compute(self) -> int:
        """Let the experts work; return how many rows they got."""
        made, load = self._dispatched, self._load
        x, counts = self._gpu.fetch(made.x.flatten(0, -2)), self._gpu.fetch(made.counts)
        y = x.new_zeros(x.shape)
        if load.layout == "experts":
            starts = self._gpu.fetch(made.offsets).tolist()
            for expert, start, end in zip(load.held(self._rank).tolist(), starts, starts[1:], strict=False):
                run_expert(load, expert, x[start:end], y[start:end])
        else:
            ids, weights = (self._gpu.fetch(one.flatten(0, -2)) for one in (made.topk_idx, made.topk_weights))
            run_experts(load, self._rank, Received(x, ids, weights, counts), y)
        brought = self._gpu.bring(y).view(made.x.shape)
        if self._graphs is None:
            self._y = brought
        else:
            self._y.copy_(brought)  # where the graph reads it
        return int((self._gpu.fetch(made.tokens) >= 0).sum())

    def combine(self) -> torch.Tensor:
        """Bring the experts' rows back and sum them for each token."""
        if self._graphs is not None:
            self._graphs[1].replay()
        else:
            self._out = self._parallel.combine(self._y, self._dispatched.handle)
            if self._is_graph:
                self._capture()
        self._gpu.finish()
        out: torch.Tensor = self._out
        return out

    def close(self) -> None:
        """Let go of its memory; no graph is replayed any more."""
        self._graphs = self._dispatched = self._y = self._out = None
        self._parallel.close()

    def _on_gpu(self, tokens: Tokens) -> Any:
        """Return tokens on the GPU, copied once; a graph takes them where the first ones were."""
        if self._tokens[0] != id(tokens):
            fresh = tuple(self._gpu.bring(one.contiguous()) for one in (tokens.x, tokens.ids, tokens.weights))
            if self._graphs is not None:
                for old, new in zip(self._tokens[1], fresh, strict=True):
                    old.copy_(new)
                fresh = self._tokens[1]
            self._tokens = (id(tokens), fresh)
        return self._tokens[1]

    def _capture(self) -> None:
        """Capture both operations. What the experts make of the rows is a copy between the two."""
        import torch

        given, y = self._tokens[1], self._y
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[0]):
            self._dispatched = self._parallel.dispatch(*given, layout=self._load.layout)
        with torch.cuda.graph(graphs[1]):
            self._out = self._parallel.combine(y, self._dispatched.handle)
        graphs[0].replay()
        graphs[1].replay()
        self._graphs = graphs


def gathers(load: Load, rank: int, tokens: Tokens) -> dict[str, Callable[[], None]]:
    """Return the floor: torch copies the rows that go to each rank into memory of our own GPU, all in one kernel."""
    import torch

    gpu, core = cuda_device.gpu(0), load_core(from_env().native)
    ids, weights = tokens.ids.numpy(), tokens.weights.numpy()
    routed = route(core, ids, weights, holders=load.holders(), local=load.local_ids(), ranks=load.ranks)
    x, index = gpu.bring(tokens.x), gpu.bring(torch.from_numpy(routed.order).long())
    into = gpu.empty((len(routed.order), load.hidden), load.torch_dtype)

    def select() -> None:
        torch.index_select(x, 0, index, out=into)
        gpu.finish()

    return {"index_select": select}
