"""Random programs of expert parallelism: a seed is a program."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from moe_programs import Cached, Combine, CombineWeights, Dispatch, Drop, Mask, Place, Program, even

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8)
LAYOUTS = ("tokens", "experts", "slots")
HIDDEN = (1, 2, 8, 16, 33, 64, 128, 256)


class Draw:
    """Draws one program."""

    def __init__(self, seed: int, worlds: tuple[int, ...]) -> None:
        self.rng = np.random.default_rng(seed)
        self.seed = seed
        self.world = self.pick(worlds)
        self.logical = int(self.rng.integers(1, 17))
        self.experts = self.logical * self.pick((1, 1, 1, 2, 3))
        self.max_tokens = self.pick((1, 4, 9))
        self.topk = int(self.rng.integers(1, min(8, self.experts) + 1))
        self.dtype = self.pick(DTYPES)
        self.handles: dict[str, Dispatch | Cached] = {}
        self.all_steps: dict[str, Dispatch | Cached] = {}
        self.lost: set[int] = set()
        self.made = 0

    def pick(self, choices: Any) -> Any:
        """One of these."""
        return choices[int(self.rng.integers(len(choices)))]

    def is_so(self, chance: float) -> bool:
        """True this often."""
        return bool(self.rng.random() < chance)

    def program(self) -> Program:
        """A program of a few steps, with dispatches that are combined, used again or thrown away."""
        holders = self.holders()
        steps = [self.dispatch()]
        for _ in range(int(self.rng.integers(2, 8))):
            steps += self.more()
        hidden = self.pick(HIDDEN[-2:]) if self.dtype == torch.float8_e4m3fn else self.pick(HIDDEN)
        return Program(
            self.world, holders, hidden, self.topk, tuple(steps), self.max_tokens, self.dtype,
            self.pick((None, None, 1, 3, self.max_tokens)), self.logical, self.seed,
            is_eager=self.is_so(0.5),
        )  # fmt: skip

    def holders(self) -> tuple[int, ...]:
        """A placement: equal shares, or any rank for any expert."""
        if self.is_so(0.5):
            return even(self.world, self.experts)
        return tuple(self.rng.integers(0, self.world, self.experts).tolist())

    def more(self) -> list[Any]:
        """What comes next."""
        kind = self.pick(("combine",) * 5 + ("dispatch",) * 3 + ("cached",) * 2 + ("weights", "drop", "place", "mask"))
        keys = list(self.handles)
        if kind == "dispatch" or not keys:
            return [self.dispatch()]
        if kind == "place":
            self.handles = {}
            return [Place(self.holders())]
        if kind == "mask":
            return self.mask()
        key = self.pick(keys)
        if kind == "cached":
            return [self.cached(key)]
        if kind == "drop":
            del self.handles[key]
            return [Drop(key)]
        if kind == "weights" and not self.is_slots(key):
            return [CombineWeights(key)]
        out = self.pick(("", "", "given", "given" if self.dtype == torch.float64 else "float32"))
        return [Combine(key, self.pick((0, 0, 1, 2)), out, self.is_so(0.2), self.is_so(0.2))]

    def dispatch(self) -> Dispatch:
        """A dispatch of new tokens."""
        experts = tuple(range(self.experts))
        some = tuple(sorted(self.rng.choice(experts, max(1, self.experts // 3), replace=False).tolist()))
        counts = tuple(self.pick((0, 1, 2, self.max_tokens, self.max_tokens)) for _ in range(self.world))
        counts = tuple(min(count, self.max_tokens) for count in counts)
        step = Dispatch(
            self.key(), counts, self.pick(LAYOUTS), self.pick((1, 1, 2, 8)), self.pick(("holder", "source")),
            self.is_so(0.8), self.pick((torch.int64, torch.int32)), self.pick((0.0, 0.0, 0.2, 0.7)), self.is_so(0.3),
            self.pick((None, None, None, some, ())), self.pick(((), (), (int(self.rng.integers(self.world)),))),
            self.x_kind(), self.is_so(0.2),
        )  # fmt: skip
        self.handles[step.key] = self.all_steps[step.key] = step
        return step

    def cached(self, key: str) -> Cached:
        """A dispatch by a handle."""
        step = Cached(self.key(), key, self.x_kind(), self.is_so(0.2))
        self.handles[step.key] = self.all_steps[step.key] = step
        return step

    def mask(self) -> list[Any]:
        """A rank is masked, once in a program; handles of before are not used any more."""
        if self.lost or self.world < 2:
            return []
        self.lost.add(int(self.rng.integers(self.world)))
        self.handles = {}
        return [Mask(next(iter(self.lost)))]

    def is_slots(self, key: str) -> bool:
        """Whether a handle is of that layout."""
        step = self.handles[key]
        while isinstance(step, Cached):
            step = self.all_steps[step.of]
        return step.layout == "slots"

    def key(self) -> str:
        """A new key."""
        self.made += 1
        return f"h{self.made}"

    def x_kind(self) -> str:
        """What rows look like."""
        return str(self.pick(("plain", "plain", "strided", "bits")))


def draw(seed: int, worlds: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8)) -> Program:
    """The program of a seed."""
    return Draw(seed, worlds).program()
