"""Planning: plans that are kept from push to push, and what they say of who needs the same bytes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import TypeVar

from raynixl.errors import ConfigError
from raynixl.weights.plan import Plan, plan
from raynixl.weights.shards import Shards

K = TypeVar("K", bound=Hashable)

planned = lru_cache(8)(plan)
"""Plans that were made: the same ranks push again and again."""


def images_of(sources: tuple[Shards, ...], needs: Mapping[K, Shards]) -> tuple[Plan, dict[K, int]]:
    """Return one plan for all whose needs the sources can meet, and the image of each of these.

    Those with one image need the very same bytes; ranks of one mesh are laid out alike and do not.
    """
    distinct = {shards.digest: shards for shards in needs.values()}
    if not _fits(sources, tuple(distinct.values())):
        distinct = {digest: shards for digest, shards in distinct.items() if _fits(sources, (shards,))}
    made = planned(sources, tuple(distinct.values()))
    numbers = dict(zip(distinct, made.image_of, strict=True))
    return made, {key: numbers[shards.digest] for key, shards in needs.items() if shards.digest in numbers}


def _fits(sources: tuple[Shards, ...], targets: tuple[Shards, ...]) -> bool:
    try:
        planned(sources, targets)
    except ConfigError:
        return False
    return True
