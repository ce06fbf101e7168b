"""Train a small mixture-of-experts transformer whose experts are spread over four Ray workers, and kill one of them.

Beside it the same model is trained in a single process: losses, parameters and Adam's moments must be the same to the
bit in float32, although a worker is killed in the middle of a step and replaced. No GPU, no downloads.
"""

import sys
from pathlib import Path

import torch
import typer
from cluster import start_ray
from display import Progress
from model import LAYERS, Model
from ranks import Ranks
from ray.exceptions import RayActorError
from text import draw_batch, load_text
from training import Training, size_of

RANKS, VICTIM = 4, 2
CLEAR_FALL = 0.5  # what the mean loss must fall by, from the first tenth of the run to the last


def main(steps: int = 200, kill_at: int = 100, out: Path = Path("experts.png")) -> None:
    """Train both ways, kill a worker on the way, draw a picture; fail unless all is equal and the loss has fallen."""
    torch.set_num_threads(1)
    start_ray(cpus=RANKS)
    ranks, progress = Ranks(RANKS), Progress(steps)
    single, text = train_in_one_process(), load_text()
    for step in range(steps):
        try:
            losses, loads = ranks.step(step, victim=VICTIM if step == kill_at else None)
        except RayActorError as error:
            progress.replace(VICTIM, type(error).__name__)
            ranks.replace(VICTIM, step)
            losses, loads = ranks.step(step)

        batches = [draw_batch(text, step, rank) for rank in range(RANKS)]
        expected = single.step(step, batches, lambda gradients: gradients.sum(dim=0))
        if losses != expected or loads != single.loads():
            sys.exit(f"FAILED: the losses of step {step + 1} are {losses}, in a single process {expected}")
        progress.add(losses, loads)

    progress.save_picture(out)
    different = ranks.differences(single.state(steps), steps)
    ranks.leave()
    if different:
        sys.exit(f"FAILED: other bits than in a single process: {', '.join(different)}")
    if len(progress.replaced) != (kill_at < steps):
        sys.exit(f"FAILED: a worker was replaced in the steps {progress.replaced}")
    first, last = progress.losses_at_ends()
    if last > first - CLEAR_FALL:
        sys.exit(f"FAILED: the loss has not clearly fallen: {first:.3f} at first, {last:.3f} at last")
    print(
        f"loss {first:.3f} -> {last:.3f} on {RANKS} workers, {len(progress.replaced)} of them killed and replaced; "
        f"losses, parameters and moments equal those of a single process bit for bit, see {out}"
    )


def train_in_one_process() -> Training:
    """Set up the training of all ranks' batches and all experts in this process, by plain torch."""
    model = Model(RANKS, [None] * LAYERS)
    return Training(model, torch.empty(2, 3, size_of(model)))


if __name__ == "__main__":
    typer.run(main)
