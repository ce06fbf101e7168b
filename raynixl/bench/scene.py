"""The scene of a measurement: one layout with its memory here and at the target, and the check of its bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from raynixl.bench.ends import bytes_of, fill_end
from raynixl.bench.layout import Bytes, Layout, digest, fill
from raynixl.bench.process import Asked
from raynixl.bench.timing import Runner
from raynixl.region import Region, RemoteRegion

REGION = "bench"
_SEED = 7


@dataclass(frozen=True, slots=True)
class Contender:
    """One row to be: what runs, how its bytes are checked (None: they cannot be), and what is known about it."""

    runner: Runner
    verify: Callable[[], bool | None]
    lane: str = ""
    is_busy: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """One layout, our memory, and the target that holds the other end under the name of REGION."""

    layout: Layout
    is_write: bool
    memory: str
    region: Region
    remote: RemoteRegion
    target: Asked
    pid: int
    far: dict[str, Any]
    kept: ExitStack
    """What contenders hold until the scene is over, when it is closed before the memory goes."""
    address: str = "127.0.0.1"
    """The target's address in the network, as our agent has found it."""

    @property
    def ours(self) -> Bytes:
        """Our memory, where it is of the host."""
        view: Bytes = self.region.array()
        return view

    def check(self, run: Callable[[], object]) -> bool:
        """Run once over cleared memory; whether the bytes of one side are then at the other."""
        return self._check(run, self.layout)

    def check_in_order(self, run: Callable[[], object]) -> bool:
        """Run once over cleared memory; whether the one side is then as the other, whatever the layout."""
        return self._check(run, Layout(self.layout.nbytes, 1, is_random=False))

    def _check(self, run: Callable[[], object], layout: Layout) -> bool:
        fill_end(self.region, _SEED if self.is_write else 0)
        self.target.ask("fill", name=REGION, seed=0 if self.is_write else _SEED)
        run()
        moved, ours = None if self.is_write else layout.numbers, bytes_of(self.region)
        theirs = self.target.ask("digest", name=REGION, moved=moved)["digest"]
        return bool(theirs == (layout.digest_moved(ours) if self.is_write else digest(ours)))

    def check_here(self, run: Callable[[], object], stand_in: Bytes) -> bool:
        """Run once; whether the bytes of our memory and of what stands in for the target's are then the same."""
        source, into = (self.ours, stand_in) if self.is_write else (stand_in, self.ours)
        fill(source, _SEED)
        fill(into, 0)
        run()
        return digest(into) == self.layout.digest_moved(source)
