"""Results of two stages: what a dispatch returns there, and the handle that its combine needs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raynixl.moe.result import Dispatched

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.moe.placement import Placement
    from raynixl.moe.result import Handle


@dataclass(frozen=True, slots=True)
class Made:
    """Under what a handle is made: the order of the view, the placement, and how many slots of how many rows."""

    view: tuple[int, int]
    placement: Placement
    slots: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class TwoLevelHandle:
    """What a dispatch in two stages leaves for its combine, and for a dispatch on the same ways."""

    across: tuple[Handle, ...]
    """By column that this rank takes part in, its own first."""
    inside: Handle
    made: Made
    ids: Tensor
    """The ids of this rank's tokens."""
    sources: Tensor
    tokens: Tensor
    """By row in the order in which they came through the last stage: its source, and its token there."""
    places: Tensor | None
    """By row likewise: where it lies among fixed slots, if that is the layout."""
    lost: tuple[int, ...] = ()

    @property
    def slots(self) -> tuple[int, int]:
        """How many fixed slots there are, and of how many rows each."""
        return self.made.slots

    @property
    def rows(self) -> int:
        """How many rows came."""
        return len(self.sources)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """By source: how many rows came from there."""
        return np.bincount(self.sources.numpy(), minlength=self.slots[0])

    @property
    def placement(self) -> int:
        """The digest of the placement that it was made under."""
        return self.made.placement.digest

    @property
    def layout(self) -> str:
        """How rows lie at their holder."""
        return self.inside.layout if self.places is None else "slots"

    @property
    def alignment(self) -> int:
        """That of each expert's rows in layout "experts"."""
        return self.inside.alignment

    @property
    def weights_at(self) -> str:
        """Who multiplies by the weights."""
        return self.inside.weights_at

    def plain(self) -> TwoLevelHandle:
        """Return the same layout without weights: combine adds up what it is given."""
        return replace(self, across=tuple(handle.plain() for handle in self.across), inside=self.inside.plain())


@dataclass(frozen=True, slots=True, eq=False)
class TwoLevelDispatched(Dispatched):
    """The rows that came to this rank through two stages; `origins` has the source of each."""

    origins: Tensor

    @property
    def sources(self) -> Tensor:
        """By row: the rank that it came from."""
        return self.origins

    @staticmethod
    def of(r: Dispatched, **changes: Any) -> TwoLevelDispatched:
        """Return what the last stage has brought, with what is known of both."""
        given = {one.name: getattr(r, one.name) for one in fields(r)}
        return TwoLevelDispatched(**{**given, **changes})


def handle_of(r: TwoLevelDispatched) -> TwoLevelHandle:
    """Return the handle of a result of two stages."""
    assert isinstance(r.handle, TwoLevelHandle), "made by two stages"
    return r.handle
