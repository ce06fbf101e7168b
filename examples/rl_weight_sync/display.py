"""What the user sees: a progress bar (or plain lines in a log) and the picture at the end."""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

INK, BLUE, ORANGE = "#333333", "#2563eb", "#ea580c"


class Progress:
    """A tqdm bar on a terminal; elsewhere, such as in a CI log, one line every tenth of the way."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.rewards: list[float] = []
        self.sync_ms: list[float] = []
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, desc="training", unit="step", disable=not self._is_terminal)

    def add(self, reward: float, sync_ms: float) -> None:
        """Record one step and show it."""
        self.rewards.append(reward)
        self.sync_ms.append(sync_ms)
        self._bar.set_postfix_str(f"reward {reward:.3f}, sync {sync_ms:.1f} ms", refresh=False)
        self._bar.update()
        done = len(self.rewards)
        if done == self.steps:
            self._bar.close()
        if not self._is_terminal and (done == 1 or 10 * done // self.steps > 10 * (done - 1) // self.steps):
            print(f"step {done:4d}/{self.steps}   reward {reward:.3f}   sync {sync_ms:5.1f} ms", flush=True)

    def rewards_at_ends(self) -> tuple[float, float]:
        """Return the mean reward of the first and of the last tenth of the run."""
        tenth = -(-len(self.rewards) // 10)
        return fmean(self.rewards[:tenth]), fmean(self.rewards[-tenth:])

    def mean_sync_ms(self) -> float:
        """Return the mean time of a sync in milliseconds."""
        return fmean(self.sync_ms)

    def save_picture(self, path: Path) -> None:
        """Draw reward and sync time by step, one above the other."""
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 2), layout="constrained"
        )
        _draw(top, self.rewards, BLUE)
        top.set(ylabel="reward", ylim=(0, 1.03))
        top.set_title("A policy learns to sort; raynixl syncs it to the rollouts every step", loc="left", color=INK)
        _draw(bottom, self.sync_ms, ORANGE)
        median = float(np.median(self.sync_ms))
        bottom.set(xlabel="step", ylabel="sync, ms", xlim=(0, len(self.rewards)), ylim=(0, 3 * median))
        bottom.set_title(f"weight sync: median {median:.1f} ms", loc="left", color=INK, fontsize=10)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw(axes: plt.Axes, values: Sequence[float], colour: str) -> None:
    """Draw each value faintly and their running median boldly."""
    width = max(1, len(values) // 40)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
    axes.plot(steps, smooth, color=colour, linewidth=2)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
