"""Train a small mixture-of-experts transformer whose experts are spread over four Ray workers, and kill one of them.

Beside it the same model is trained in a single process: losses, parameters and Adam's moments must be the same to the
bit in float32, although a worker is killed in the middle of a step and replaced. No GPU, no downloads.
"""

import sys
import time
from pathlib import Path

import ray
import torch
import typer
from cluster import start_ray
from display import Progress
from model import LAYERS, Model
from ray.actor import ActorHandle
from ray.exceptions import RayError
from text import draw_batch, load_text
from training import Training, size_of
from worker import ExpertWorker

RANKS = 4
VICTIM, KILL_AFTER = 2, 0.02  # the rank that is killed, and how many seconds after its step was begun
CLEAR_FALL = 0.25  # what the mean loss must fall by, from the first tenth of the run to the last


class Cluster:
    """The workers, one for each rank, and how one of them is replaced."""

    def __init__(self) -> None:
        self.generation = 0
        self.workers = [self._start(rank) for rank in range(RANKS)]
        self._join(step=0)

    def step(self, step: int, victim: int | None = None) -> tuple[list[float], list[dict[int, int]]]:
        """Have all ranks do a step; return the loss of each, and for each layer how many tokens each expert saw."""
        results = [worker.step.remote(step) for worker in self.workers]
        if victim is not None:
            time.sleep(KILL_AFTER)
            ray.kill(self.workers[victim])
        losses, loads = zip(*ray.get(results), strict=True)
        merged = [{name: seen for part in layer for name, seen in part.items()} for layer in zip(*loads, strict=True)]
        return [loss for (loss,) in losses], merged

    def replace(self, rank: int, step: int) -> None:
        """Start a worker in a rank's place; all ranks go on with the step that was under way."""
        self.generation += 1
        self.workers[rank] = self._start(rank)
        self._join(step)

    def differences(self, single: Training, step: int) -> list[str]:
        """Name the parameters whose bits, or those of their moments, are others before a step in a single process."""
        ours, theirs = {}, single.state(step)
        for rank, state in enumerate(ray.get([worker.state.remote(step) for worker in self.workers])):
            ours |= {name.replace("copies.0.", f"copies.{rank}."): values for name, values in state.items()}
        assert ours.keys() == theirs.keys(), "the ranks have other parameters than the single process"
        return [name for name, values in ours.items() if not torch.equal(values, theirs[name])]

    def _start(self, rank: int) -> ActorHandle:
        return ExpertWorker.options(name=f"rank-{rank}-{self.generation}").remote()

    def _join(self, step: int) -> None:
        names = ray.get([worker.name.remote() for worker in self.workers])
        ray.get([worker.join.remote(names, self.generation, step) for worker in self.workers])


def main(steps: int = 200, kill_at: int = 100, out: Path = Path("experts.png")) -> None:
    """Train both ways, kill a worker on the way, draw a picture; fail unless all is equal and the loss has fallen."""
    torch.set_num_threads(1)
    start_ray(cpus=RANKS)
    cluster, progress, text = Cluster(), Progress(steps), load_text()
    model = Model(RANKS, [None] * LAYERS)
    single = Training(model, torch.empty(2, 3, size_of(model)))
    for step in range(steps):
        try:
            losses, loads = cluster.step(step, victim=VICTIM if step == kill_at else None)
        except RayError as error:
            progress.replace(VICTIM, type(error).__name__)
            cluster.replace(VICTIM, step)
            losses, loads = cluster.step(step)
        batches = [draw_batch(text, step, rank) for rank in range(RANKS)]
        expected = single.step(step, batches, lambda gradients: gradients.sum(dim=0))
        if losses != expected or loads != single.loads():
            sys.exit(f"FAILED: the losses of step {step} are {losses}, in a single process {expected}")
        progress.add(losses, loads)

    progress.save_picture(out)
    if different := cluster.differences(single, steps):
        sys.exit(f"FAILED: other bits than in a single process: {', '.join(different)}")
    if len(progress.replaced) != (kill_at < steps):
        sys.exit("FAILED: the worker that was to be killed has not been replaced once")
    first, last = progress.losses_at_ends()
    if last > first - CLEAR_FALL:
        sys.exit(f"FAILED: the loss has not clearly fallen: {first:.3f} at first, {last:.3f} at last")
    print(f"loss {first:.3f} -> {last:.3f}, all {steps} steps as in a single process, bit for bit, see {out}")


if __name__ == "__main__":
    typer.run(main)
