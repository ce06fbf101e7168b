"""Instances: the expert parallelism behind one DeepEP buffer, made when the shapes of its steps become known."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from raynixl.errors import Masked, PeerLost, RangeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from raynixl.compat.deep_ep.members import Members
    from raynixl.moe.parallel import ExpertParallel

T = TypeVar("T")
_LEAST_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """What all ranks agree on before the first step of its kind."""

    experts: int
    hidden: int
    topk: int


class Instances:
    """One `ExpertParallel` for each shape and number of tokens. Making one is collective, as its first use is."""

    def __init__(self, members: Members, *, deadline: float | None, may_shrink: bool) -> None:
        self.members = members
        self._deadline = deadline
        self._may_shrink = may_shrink
        self._made: dict[tuple[Shape, int], ExpertParallel] = {}
        self._current: dict[Shape, ExpertParallel] = {}
        self._fixed: dict[Shape, tuple[int, ExpertParallel]] = {}
        self._masked: set[int] = set()
        self._out: list[ExpertParallel] = []
        self._end = weakref.finalize(self, _close, self._made, members)

    def get(self, shape: Shape, tokens: int) -> ExpertParallel:
        """Return the instance for up to so many tokens a rank, a number that all ranks give alike."""
        made = self._made.get((shape, tokens))
        if made is None:
            from raynixl.moe.parallel import ExpertParallel

            made = ExpertParallel(
                self.members.group, experts=shape.experts, hidden=shape.hidden, topk=shape.topk, max_tokens=tokens,
                name=f"deep_ep-{self.members.group.name}-{len(self._made)}", deadline=self._deadline,
            )  # fmt: skip
            self._made[shape, tokens] = made
            for rank in sorted(self._masked):
                made.mask(rank)
        return made

    def run(self, shape: Shape, tokens: int, step: Callable[[ExpertParallel], Any]) -> tuple[ExpertParallel, Any]:
        """Run a step for which no number of tokens was agreed: the first one, and one that does not fit, agree on it.

        Raises:
            RangeError: the step is wrong for another reason, on all ranks.
        """
        current = self._current.get(shape)
        if current is None:
            current = self._grow(shape, tokens)
        try:
            return current, self.done(current, lambda: step(current))
        except RangeError:
            grown = self._grow(shape, tokens)
            if grown is current:
                raise
        return grown, self.done(grown, lambda: step(grown))

    def fixed(self, shape: Shape, tokens: int, worst: int) -> ExpertParallel:
        """Return the instance for steps whose sizes no host hears, where so many rows come to a rank at the worst.

        All ranks give the same `worst`. At the first step, and where it is more than before, they agree on how many
        tokens each may have.
        """
        known, parallel = self._fixed.get(shape, (0, None))
        if parallel is None or worst > known:
            parallel = self._grow(shape, max(tokens, -(-worst // self.members.world)))
            self._fixed[shape] = worst, parallel
        return parallel

    def is_direct(self, parallel: ExpertParallel, gpu: int | None) -> bool:
        """Whether kernels put rows of tensors on this GPU into the peers' memory. Collective the first time."""
        if gpu is not None and parallel.is_direct is None:
            self.done(parallel, lambda: parallel.synchronise(gpu))
        return gpu is not None and bool(parallel.is_direct)

    def owns(self, parallel: ExpertParallel) -> bool:
        """Whether an instance is one of these."""
        return any(parallel is made for made in self._made.values())

    def check(self, parallel: ExpertParallel) -> None:
        """Refuse the result of a step that went on without some ranks, unless the buffer may shrink.

        Raises:
            PeerLost: as said.
        """
        if self._may_shrink or len(parallel.active) == self.members.world:
            return
        gone = [rank for rank in range(self.members.world) if rank not in {*parallel.active, *self._masked}]
        if gone:
            names = [self.members.group.members[rank] for rank in gone]
            raise PeerLost(
                f"ranks {gone} ({', '.join(names)}) are lost: their rows are missing",
                hint="make the buffer with enable_shrink=True to go on without them", peer=names[0],
            )  # fmt: skip

    def done(self, parallel: ExpertParallel, step: Callable[[], T]) -> T:
        """Take a step, or wait for one that was started; return its result, unless `check` refuses it.

        Raises:
            Masked: the others have gone on without us; `unmask` of our own rank comes back.
        """
        try:
            result = step()
        except Masked:
            if parallel not in self._out:
                self._out.append(parallel)
            raise
        self.check(parallel)
        return result

    def mask(self, rank: int) -> None:
        """Leave a rank out from the next step on."""
        self._masked.add(rank)
        for made in self._made.values():
            made.mask(rank)

    def unmask(self, rank: int) -> None:
        """Let a rank take part again. Of our own rank: come back where the others have masked us; it takes a step.

        Where steps are on GPUs it takes no step but this very call, of all others between the same two steps: who does
        not come back meanwhile is let in by a later one.
        """
        self._masked.discard(rank)
        if rank == self.members.rank:
            while self._out:
                self._come_back(self._out[-1])
                self._out.pop()
            return
        self.settle()  # all ranks must find alike that a rank is out
        for made in self._made.values():
            made.unmask(rank)
            if made.is_direct is not None and rank not in made.active:
                made.synchronise()

    def settle(self) -> None:
        """Wait for what is on GPUs, and hear which ranks were lost in it."""
        for made in self._made.values():
            with contextlib.suppress(Masked):  # the next step says so
                made.settle()

    @property
    def masked(self) -> tuple[int, ...]:
        """The ranks that take no part: those that were masked, and those that were lost."""
        every = set(range(self.members.world))
        gone = set(self._masked)
        for made in self._made.values():
            gone |= every - set(made.active)
        return tuple(sorted(gone))

    def close(self) -> None:
        """Close all that was made; idempotent."""
        self._end()

    def _come_back(self, parallel: ExpertParallel) -> None:
        is_on_gpu = parallel.is_direct is not None
        parallel.rejoin()
        if is_on_gpu:
            parallel.synchronise()

    def _grow(self, shape: Shape, tokens: int) -> ExpertParallel:
        """Return the instance for as many tokens as the rank that has most; all ranks call this."""
        most = int(self.members.gather(np.array([tokens], np.int64)).max())
        current = self._current.get(shape)
        if current is not None and most <= current.max_tokens:
            return current
        made = self.get(shape, max(_LEAST_TOKENS, 1 << max(0, most - 1).bit_length()))
        self._current[shape] = made
        return made


def _close(made: dict[tuple[Shape, int], ExpertParallel], members: Members) -> None:
    for one in made.values():
        one.close()
    members.close()
