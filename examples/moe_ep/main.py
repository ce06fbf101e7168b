"""Expert parallelism: four Ray workers hold the experts of one mixture-of-experts layer, two each.

Tokens travel to the workers that hold their experts, and the results back, by one-sided writes. The result must
equal that of the dense layer, computed in one place.
"""

import sys
import time

import ray
import torch
from cluster import start_ray
from exchange import Exchange, Words
from layer import EXPERTS, WIDTH, MoELayer, apply_experts, choose_experts
from rich.console import Console
from rich.table import Table
from torch import Tensor

import raynixl as rx

RANKS, CAPACITY = 4, 64  # workers, and the most tokens that one of them brings
LOCAL_EXPERTS = EXPERTS // RANKS
MEMBERS = [f"expert-{rank}" for rank in range(RANKS)]
BATCHES = ((32, 32, 32, 32), (64, 0, 17, 5), (0, 0, 1, 0), (0, 0, 0, 0), (64, 64, 64, 64), (7, 30, 0, 51))
TOLERANCE = 1e-6  # the sums are those of the dense layer, in another order


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
@rx.worker
class ExpertWorker:
    """One rank: brings tokens of its own, and applies its experts to those of all ranks."""

    def __init__(self, rank: int, layer: MoELayer) -> None:
        torch.set_num_threads(1)
        self.router = layer.router
        self.experts = layer.experts[rank * LOCAL_EXPERTS : (rank + 1) * LOCAL_EXPERTS]
        words = Words(rx.agent())
        self.dispatch = Exchange("dispatch", MEMBERS, words, capacity=CAPACITY, width=WIDTH + LOCAL_EXPERTS)
        self.combine = Exchange("combine", MEMBERS, words, capacity=CAPACITY, width=WIDTH)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for this rank's tokens; every rank must call it."""
        gates = choose_experts(self.router, x).unflatten(1, (RANKS, LOCAL_EXPERTS))
        sent = [gates[:, rank].any(dim=1).nonzero().squeeze(1) for rank in range(RANKS)]
        rows = [torch.cat([x[tokens], gates[tokens, rank]], dim=1) for rank, tokens in enumerate(sent)]

        arrived = self.dispatch.swap(rows)
        results = [apply_experts(self.experts, part[:, :WIDTH], part[:, WIDTH:]) for part in arrived]
        returned = self.combine.swap(results)

        total = torch.zeros_like(x)
        for tokens, part in zip(sent, returned, strict=True):  # in rank order, so runs agree bit for bit
            total[tokens] += part
        return total


@torch.no_grad()
def main() -> None:
    start_ray(cpus=RANKS)
    torch.manual_seed(0)
    layer = MoELayer()
    workers = [ExpertWorker.options(name=name).remote(rank, layer) for rank, name in enumerate(MEMBERS)]
    ray.get([worker.__ray_ready__.remote() for worker in workers])
    table = Table(title=f"{EXPERTS} experts on {RANKS} workers against the dense layer")
    for column in ("tokens of each rank", "largest output", "largest error", "ms"):
        table.add_column(column, justify="right")
    worst = 0.0
    for counts in BATCHES:
        x = torch.randn(sum(counts), WIDTH).split(counts)
        begin = time.perf_counter()
        outputs = torch.cat(ray.get([worker.forward.remote(part) for worker, part in zip(workers, x, strict=True)]))
        elapsed_ms = 1e3 * (time.perf_counter() - begin)
        dense = layer(torch.cat(x))
        error = (outputs - dense).abs().amax().item() if len(dense) else 0.0
        largest = dense.abs().amax().item() if len(dense) else 0.0
        table.add_row(" ".join(map(str, counts)), f"{largest:.3f}", f"{error:.1e}", f"{elapsed_ms:.1f}")
        worst = max(worst, error)
    Console(width=100).print(table)
    if worst > TOLERANCE:
        sys.exit(f"FAILED: the result differs from the dense layer by {worst:.1e}")
    print(f"the result equals the dense layer's: largest error {worst:.1e}")


if __name__ == "__main__":
    main()
