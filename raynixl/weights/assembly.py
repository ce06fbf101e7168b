"""Assembly: what the sources of a version say of their parts, put together for each image; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import IntegrityError, PeerLost, RaynixlError
from raynixl.region import RemoteRegion
from raynixl.weights.plan import Plan
from raynixl.weights.protocol import Holder
from raynixl.weights.sourcing import Freeze, Frozen
from raynixl.weights.targeting import Blob, BlobAt

U64 = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class DeltaPart:
    """One part's blob of a delta image, and where each source that has it holds it: (region, offset)."""

    part: int
    nbytes: int
    digests: U64
    holders: tuple[tuple[RemoteRegion, int], ...]


@dataclass(frozen=True, slots=True)
class Assembled:
    """A version as its sources froze it: for each image the digests of its chunks, for each part who holds it.

    `deltas` has an image if every part that gives it bytes offers what changed since `base`, in the order of places.
    """

    version: int
    base: int
    chunk_nbytes: int
    digests: Mapping[int, U64]
    holders: tuple[tuple[Holder, ...], ...]
    deltas: Mapping[int, tuple[DeltaPart, ...]]
    failed: Mapping[str, RaynixlError]
    nbytes: int
    copy_out_seconds: float
    digest_seconds: float


def assemble(
    plan: Plan,
    asked: tuple[Freeze, int],
    answered: tuple[Sequence[str], Mapping[str, Frozen], Mapping[str, RaynixlError]],
) -> Assembled:
    """Add up what sources say of a version; sources are named in the order of the plan.

    Raises:
        IntegrityError: replicas of a part hold different weights.
        RaynixlError: no source of some part took part: the error of one.
    """
    (request, chunk_nbytes), (names, frozen, failed) = asked, answered
    parts = []
    for members in plan.parts:
        own = [names[member] for member in members if names[member] in frozen]
        if not own:
            errors = [failed[names[member]] for member in members if names[member] in failed]
            raise errors[0] if errors else PeerLost("a part of the weights has no source left", hint="restart it")
        _check_equal(own, frozen)
        parts.append([frozen[name] for name in own])
    digests = {image: _sums(plan, image, chunk_nbytes, parts) for image in range(len(plan.images))}
    return Assembled(
        version=request.version, base=request.base, chunk_nbytes=chunk_nbytes, digests=digests,
        holders=tuple(tuple(one.holder for one in own) for own in parts), deltas=_deltas(plan, request, parts),
        failed=failed, nbytes=sum(own[0].nbytes for own in parts),
        copy_out_seconds=max(one.copy_out_seconds for one in frozen.values()),
        digest_seconds=max(one.digest_seconds for one in frozen.values()),
    )  # fmt: skip


def _check_equal(names: Sequence[str], frozen: Mapping[str, Frozen]) -> None:
    """Refuse replicas that do not hold the same bytes."""
    first = frozen[names[0]].partials
    for name in names[1:]:
        other = frozen[name].partials
        same = first.keys() == other.keys() and all(
            np.array_equal(first[image].chunks, other[image].chunks)
            and np.array_equal(first[image].digests, other[image].digests)
            for image in first
        )
        if not same:
            raise IntegrityError(
                f"sources {names[0]!r} and {name!r} hold different weights",
                hint="sources of equal shards are replicas: give one of them, or bring them into step", peer=name,
            )  # fmt: skip


def _sums(plan: Plan, image: int, chunk_nbytes: int, parts: Sequence[Sequence[Frozen]]) -> U64:
    count = sum(-(-size // chunk_nbytes) for size in plan.images[image].arenas)
    sums = np.zeros((count, 2), np.uint64)
    for own in parts:
        partial = own[0].partials.get(image)
        if partial is None:
            continue
        if len(partial.chunks) and int(partial.chunks[-1]) >= count:
            name = own[0].holder.name
            raise IntegrityError(f"{name!r} digested chunks that no image has", hint="push again", peer=name)
        sums[partial.chunks] += partial.digests
    return sums


def _deltas(plan: Plan, request: Freeze, parts: Sequence[Sequence[Frozen]]) -> dict[int, tuple[DeltaPart, ...]]:
    if not request.base:
        return {}
    found = {}
    for image in sorted({image for own in parts for one in own for image in one.deltas}):
        giving = [part for part, own in enumerate(parts) if image in own[0].partials]
        blobs = [_blob(part, image, request.base, parts[part]) for part in giving]
        complete = tuple(blob for blob in blobs if blob is not None)
        if complete and len(complete) == len(giving):
            found[image] = complete
    return found


def _blob(part: int, image: int, base: int, frozen: Sequence[Frozen]) -> DeltaPart | None:
    """Return a part's blob and all who have it; replicas make equal ones."""
    head = next((one.deltas[image] for one in frozen if image in one.deltas), None)
    if head is None or head.base != base:
        return None
    holders = []
    for one in frozen:
        offer, region = one.deltas.get(image), one.delta_region
        if offer is None or region is None or offer.offset + offer.nbytes > region.nbytes:
            continue
        if (offer.nbytes, offer.base) == (head.nbytes, base) and np.array_equal(offer.digests, head.digests):
            holders.append((RemoteRegion(one.holder.name, one.holder.incarnation, region), offer.offset))
    return DeltaPart(part, head.nbytes, head.digests, tuple(holders)) if holders else None


def told_delta(parts: Sequence[DeltaPart]) -> tuple[tuple[Blob, ...], U64]:
    """Return a delta's blobs as they are told to targets, and the digests of all their chunks."""
    blobs = tuple(
        Blob(
            nbytes=part.nbytes,
            at=tuple(
                BlobAt(owner=region.owner, incarnation=region.incarnation, region=region.record, offset=offset)
                for region, offset in part.holders
            ),
        )
        for part in parts
    )
    if not parts:
        return (), np.zeros((0, 2), np.uint64)
    return blobs, np.concatenate([part.digests for part in parts])
