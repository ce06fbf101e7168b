"""What the user sees: a line now and then, and the picture at the end."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

INK, BLUE, ORANGE = "#333333", "#2563eb", "#ea580c"


class Progress:
    """Keeps the losses of all ranks and the loads of all experts, and prints a line every tenth of the way."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: list[Sequence[float]] = []
        self.loads: list[list[list[int]]] = []
        self.replaced: list[int] = []

    def add(self, losses: Sequence[float], loads: Sequence[dict[int, int]]) -> None:
        """Record one step: the loss of each rank, and for each layer how many tokens each expert saw."""
        self.losses.append(losses)
        self.loads.append([[seen for _, seen in sorted(layer.items())] for layer in loads])
        done = len(self.losses)
        if done == 1 or 10 * done // self.steps > 10 * (done - 1) // self.steps:
            tokens = "   ".join(" ".join(f"{seen:4d}" for seen in layer) for layer in self.loads[-1])
            print(f"step {done:4d}/{self.steps}   loss {fmean(losses):.3f}   tokens per expert {tokens}", flush=True)

    def replace(self, rank: int, reason: str) -> None:
        """Record that a rank is replaced, in the step that comes next."""
        self.replaced.append(len(self.losses))
        print(f"step {len(self.losses) + 1}: {reason}; rank {rank} is replaced, and the step is done again", flush=True)

    def losses_at_ends(self) -> tuple[float, float]:
        """Return the mean loss of the first and of the last tenth of the run."""
        tenth = -(-len(self.losses) // 10)
        means = [fmean(losses) for losses in self.losses]
        return fmean(means[:tenth]), fmean(means[-tenth:])

    def save_picture(self, path: Path) -> None:
        """Draw the loss, and below it for each layer how many tokens each expert saw, by step."""
        loads = np.array(self.loads)
        layers = loads.shape[1]
        figure, axes = plt.subplots(
            1 + layers, 1, figsize=(8, 4 + 2 * layers), sharex=True, height_ratios=(3, *[2] * layers),
            layout="constrained",
        )  # fmt: skip
        top = axes[0]
        top.plot(self.losses, color=BLUE, alpha=0.25, linewidth=1)
        top.plot([fmean(losses) for losses in self.losses], color=BLUE, linewidth=2)
        for step in self.replaced:
            top.axvline(step, color=ORANGE)
            top.annotate(" a rank is killed and replaced", (step, top.get_ylim()[1]), color=ORANGE, va="top")
        top.set(ylabel="loss, nats per character")
        top.set_title("The same losses, bit for bit, as in a single process", loc="left", color=INK)
        top.spines[["top", "right"]].set_visible(False)
        for number, below in enumerate(axes[1:]):
            image = below.imshow(loads[:, number].T, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
            below.set(ylabel="expert", yticks=range(loads.shape[2]))
            below.set_title(f"layer {number + 1}: tokens per expert", loc="left", color=INK, fontsize=10)
            figure.colorbar(image, ax=below)
        axes[-1].set(xlabel="step")
        figure.savefig(path, dpi=150)
        plt.close(figure)
