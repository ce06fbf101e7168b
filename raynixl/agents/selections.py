"""Selections: what users name as the two ends of a transfer, as blocks of regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raynixl.backends.base import Op
from raynixl.blocks import Blocks, Table
from raynixl.errors import ConfigError
from raynixl.region import Region, RemoteRegion

Selection = Region | RemoteRegion | Blocks
Selections = Selection | Sequence[Selection]


def as_list(selections: Selections) -> list[Selection]:
    """Return what a transfer reads or writes as a list.

    Raises:
        ConfigError: it is nothing that can be moved.
    """
    if isinstance(selections, Region | RemoteRegion | Blocks):
        return [selections]
    if not isinstance(selections, Sequence) or not selections:
        raise ConfigError(
            f"{type(selections).__name__} is not what a transfer moves",
            hint="register it first: agent.register(x) is a region; pass regions, spans, pages or a list of them",
        )
    return list(selections)


def as_blocks(item: Selection, kind: type[Region] | type[RemoteRegion], op: Op, whose: str) -> Blocks:
    """Return the blocks of one item, which must lie in a region of that kind.

    Raises:
        ConfigError: it lies on the other side, or is no selection.
    """
    blocks = item.span() if isinstance(item, Region | RemoteRegion) else item
    if not isinstance(blocks, Blocks) or not isinstance(blocks.region, kind):
        raise ConfigError(
            f"a {op.value} needs a {whose} region here, not {type(getattr(item, 'region', item)).__name__}",
            hint="read(peer's, ours) and write(ours, peer's): source first, destination second",
        )
    return blocks


def distinct(items: list[Blocks]) -> tuple[list[Any], list[tuple[int, Table]]]:
    """Return the regions, each once, and for each item which one it lies in, and its table.

    Descriptors are compared only with those of the same number: there may be thousands, and each costs microseconds.
    """
    regions: list[Any] = []
    known: dict[tuple[int, int], list[int]] = {}
    tables = []
    for item in items:
        region = item.region
        alike = known.setdefault((region.id, region.generation), [])
        place = next((number for number in alike if regions[number] == region), None)
        if place is None:
            place = len(regions)
            regions.append(region)
            alike.append(place)
        tables.append((place, item.table))
    return regions, tables
