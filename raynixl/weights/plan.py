"""Plan: which bytes of which source go where at each target, decided once for two ways of sharding a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import ConfigError, IntegrityError
from raynixl.weights.columns import Columns, pack_columns
from raynixl.weights.difference import DTYPE_DIFFERS, Difference, table
from raynixl.weights.holdings import Held, Holdings
from raynixl.weights.intersect import overlaps, runs
from raynixl.weights.layout import Layout, shape_text
from raynixl.weights.needs import Image, Needs
from raynixl.weights.pieces import Ints, distinct, widened
from raynixl.weights.ranges import Ranges, join
from raynixl.weights.shards import Shards
from raynixl.weights.table import ARENA_SHIFT, Geometries, Table, hashes

_MAGIC = b"RXPL"
_OFFSET = (1 << ARENA_SHIFT) - 1


class Group(NamedTuple):
    """Tensors that go from everywhere to everywhere in the same way, and the runs of each; `key` sorts the runs.

    A key is image * parts + part; positions are from where the tensor's slot begins on either side.
    """

    tensor: Ints
    wanted: Ints
    key: Ints
    part: Ints
    source_slot: Ints
    source: Ints
    slot: Ints
    target: Ints
    numbers: Ints  # run nbytes, repeats, source stride, stride
    turn: Ints
    turns: Ints


class Images(Sequence[Layout]):
    """The layouts of all images; each is made when it is first asked for."""

    def __init__(self, images: Sequence[Image]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, number: int) -> Layout: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[Layout, ...]: ...
    def __getitem__(self, number: int | slice) -> Layout | tuple[Layout, ...]:
        if isinstance(number, slice):
            return tuple(image.layout for image in self._images[number])
        return self._images[number].layout


@dataclass(frozen=True, eq=False)
class Plan:
    """Who pulls what from whom. Made by `plan`; ranges are worked out when they are asked for, at whichever rank asks.

    `parts` are the distinct shards of the source: which source ranks hold each. `images` are the distinct needs of the
    targets, `image_of` names that of each target.
    """

    sources: tuple[Shards, ...]
    targets: tuple[Shards, ...]
    parts: tuple[tuple[int, ...], ...]
    image_of: tuple[int, ...]
    _holdings: Holdings
    _images: tuple[Image, ...]
    _groups: dict[int, list[Group]]

    def __str__(self) -> str:
        return (
            f"{len(self.sources)} sources in {len(self.parts)} parts to {len(self.targets)} targets with "
            f"{len(self._images)} images of {sum(self.nbytes) / 1e9:,.3f} GB in all"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def images(self) -> Images:
        """The layout of each image."""
        return Images(self._images)

    @cached_property
    def part_of(self) -> tuple[int, ...]:
        """The part that each source holds."""
        found = {source: part for part, members in enumerate(self.parts) for source in members}
        return tuple(found[source] for source in range(len(self.sources)))

    @cached_property
    def nbytes(self) -> tuple[int, ...]:
        """The bytes that each image pulls: what its target needs, each byte once, and no padding."""
        return tuple(self.shares.sum(axis=1).tolist())

    @cached_property
    def shares(self) -> Ints:
        """The bytes that each image pulls from each part, (images, parts)."""
        sums = np.zeros((len(self._images), len(self.parts)), np.int64)
        for groups in self._groups.values():
            for group in groups:
                _add_nbytes(sums, group, self._images)
        return sums

    @cached_property
    def digest(self) -> str:
        """What names this plan once it has travelled."""
        import xxhash

        names = [shards.digest for shards in (*self.sources, *self.targets)]
        return xxhash.xxh3_128_hexdigest(f"{len(self.sources)}\n{chr(10).join(names)}".encode())

    def key(self, chunk_nbytes: int) -> str:
        """Return what names it in messages, together with the size of the chunks that images are cut in."""
        import xxhash

        return xxhash.xxh3_128_hexdigest(f"{self.digest} in chunks of {chunk_nbytes}".encode())

    def incoming(self, image: int) -> Ranges:
        """Return all ranges that fill an image."""
        return join(self._rows(image, range(len(self.parts))))

    def outgoing(self, source: int) -> tuple[tuple[int, Ranges], ...]:
        """Return what the part that a source holds gives to each image that needs any of it."""
        part = self.part_of[source]
        found = ((image, self._rows(image, range(part, part + 1))) for image in range(len(self._images)))
        return tuple((image, join(rows)) for image, rows in found if len(rows))

    def _rows(self, image: int, parts: range) -> Ints:
        own = self._images[image]
        rows = [
            _instantiate(group, (first, last), (self._holdings, own))
            for group in self._groups[id(own.needs)]
            for first, last in [_span(group, image * len(self.parts) + np.array([parts.start, parts.stop]))]
            if first < last
        ]
        return np.concatenate(rows) if rows else np.zeros((0, 9), np.int64)

    def to_bytes(self) -> bytes:
        """Return the plan as bytes for a peer, which works the ranges out again."""
        tables: dict[str, int] = {}
        both = (*self.sources, *self.targets)
        numbers = np.array([tables.setdefault(own.table.digest, len(tables)) for own in both], np.int64)
        ranks = np.array([own.rank for own in both], np.int64)
        blobs = [next(own.table for own in both if own.table.digest == digest).to_bytes() for digest in tables]
        counts, lengths = np.array([len(self.sources)], np.int64), np.array([len(blob) for blob in blobs], np.int64)
        head = pack_columns(_MAGIC, [], [counts, numbers, ranks, lengths])
        return b"".join((len(head).to_bytes(4, "little"), head, *blobs))

    @staticmethod
    def from_bytes(data: bytes) -> Plan:
        """Parse a plan that a peer sent.

        Raises:
            IntegrityError: it is malformed, or its shards do not fit each other.
        """
        length = int.from_bytes(data[:4], "little")
        columns = Columns(data[4 : 4 + length], _MAGIC, "a plan")
        count = int(columns.array(1)[0])
        numbers = columns.array(None)
        ranks = columns.array(len(numbers)).tolist()
        lengths = columns.array(None)
        columns.end()
        ends = 4 + length + np.cumsum(lengths)
        if (
            not len(lengths)
            or int(ends[-1]) != len(data)
            or count > len(numbers)
            or int(numbers.max(initial=0)) >= len(lengths)
        ):
            raise columns.malformed("its parts do not fit")
        tables = [
            Table.from_bytes(data[end - size : end]) for end, size in zip(ends.tolist(), lengths.tolist(), strict=True)
        ]
        both = [Shards.at(tables[number], rank) for number, rank in zip(numbers.tolist(), ranks, strict=True)]
        try:
            return plan(both[:count], both[count:])
        except ConfigError as exc:
            raise IntegrityError(f"a plan is malformed: {exc.message}", hint="it is not from raynixl") from exc


def plan(sources: Sequence[Shards], targets: Sequence[Shards]) -> Plan:
    """Decide which bytes of which source go where at each target.

    Raises:
        ConfigError: what a target needs is not what the sources hold; the message has a table of the differences.
    """
    if not sources or not targets:
        raise ConfigError(f"a plan from {len(sources)} sources to {len(targets)} targets", hint="name one of each")
    holdings = Holdings(sources)
    needs: dict[str, Needs] = {}
    for shards in targets:
        if shards.table.digest not in needs:
            needs[shards.table.digest] = Needs(shards.table, holdings)
    rows = [*holdings.differences, *_unexpected(holdings, list(needs.values()))]
    rows += [row for own in needs.values() for row in own.differences]
    refuse(rows)
    images, image_of = _images(needs, targets)
    groups = {id(own): list(_groups(holdings, own, images, rows)) for own in needs.values()}
    refuse(rows)
    return Plan(tuple(sources), tuple(targets), holdings.parts, image_of, holdings, images, groups)


def _images(needs: Mapping[str, Needs], targets: Sequence[Shards]) -> tuple[tuple[Image, ...], tuple[int, ...]]:
    """Return the distinct images, and which one each target has."""
    made: dict[str, Image] = {}
    for shards in targets:
        if shards.digest not in made:
            made[shards.digest] = Image(needs[shards.table.digest], shards.rank)
    dims = max(own.table.geometries.start.shape[1] for own in needs.values())
    keys = {digest: image.key(dims) if len(needs) > 1 else digest for digest, image in made.items()}
    first: dict[object, int] = {}
    images: list[Image] = []
    for digest, image in made.items():
        if first.setdefault(keys[digest], len(images)) == len(images):
            images.append(image)
    return tuple(images), tuple(first[keys[shards.digest]] for shards in targets)


def refuse(rows: Sequence[Difference]) -> None:
    """Raise if there are differences.

    Raises:
        ConfigError: there are.
    """
    rows = list(dict.fromkeys(rows))
    if rows:
        tensors = "1 tensor differs" if len(rows) == 1 else f"{len(rows)} tensors differ"
        hint = "give both the same model"
        if all(row.reason == DTYPE_DIFFERS for row in rows):
            hint = "give both the same dtype: publish(cast=...) casts on the way"
        raise ConfigError(f"{tensors} between sources and targets:\n{table(rows)}", hint=hint)


def _unexpected(holdings: Holdings, needs: Sequence[Needs]) -> Iterator[Difference]:
    """Find tensors of the source that no target knows, under whichever of their names."""
    known = np.zeros(len(holdings.tensors), np.bool_)
    for own in needs:
        numbers = [holdings.index.get(info.name, -1) for info in own.table.tensors]
        known[holdings.alias[[number for number in numbers if number >= 0]]] = True
    unknown = np.flatnonzero(~known[holdings.alias])
    named = hashes(holdings.tensors[number].name for number in unknown.tolist())
    offered = np.unique(np.concatenate([own.table.others for own in needs]))
    for number in unknown[~np.isin(named, offered)].tolist():
        info = holdings.tensors[number]
        yield Difference(info.name, shape_text(info.dtype, info.shape), "-", "unexpected: the target has none")


def _groups(holdings: Holdings, needs: Needs, images: Sequence[Image], rows: list[Difference]) -> Iterator[Group]:
    table = needs.table
    number_of = np.full(table.ranks, -1, np.int64)
    for number, image in enumerate(images):
        if image.needs is needs:
            number_of[image.rank] = number
    used = np.flatnonzero((needs.wanted >= 0) & (table.geometry_of >= 0))
    kinds, of = distinct((holdings.class_of[needs.wanted[used]], table.geometry_of[used], table.itemsizes[used]))
    order = np.argsort(of, kind="stable")
    bounds = [0, *np.cumsum(np.bincount(of, minlength=len(kinds))).tolist()]
    held: dict[int, Held] = {}
    for (kind, geometry, itemsize), (first, last) in zip(kinds.tolist(), itertools.pairwise(bounds), strict=True):
        tensors = used[order[first:last]]
        pieces = table.geometries.of(geometry)
        own = Geometries(*(column[number_of[pieces.rank] >= 0] for column in pieces))
        own = own._replace(number=number_of[own.rank])  # now of images
        if kind not in held:
            held[kind] = holdings.held(kind)
        if len(own.rank):
            group, is_whole = _group(held[kind], own, (itemsize, len(holdings.parts)))
            if not is_whole:
                rows += [_partial(table, tensor, holds_any=len(held[kind].part) > 0) for tensor in tensors.tolist()]
            yield group._replace(tensor=tensors, wanted=needs.wanted[tensors])


def _partial(table: Table, tensor: int, *, holds_any: bool) -> Difference:
    info = table.tensors[tensor]
    what = "some of it" if holds_any else "none of it"
    return Difference(info.name, what, shape_text(info.dtype, info.shape), "missing at the source")


def _group(held: Held, own: Geometries, sizes: tuple[int, int]) -> tuple[Group, bool]:
    """Return the runs from what is held to what images need, and whether they bring all of it."""
    itemsize, parts = sizes
    dims = max(own.start.shape[1], held.cells.start.shape[1])
    start, size, stride = (widened(box, dims, n) for box, n in ((own.start, 0), (own.size, 1), (own.stride, 0)))
    known = [widened(box, dims, n) for box, n in ((held.cells.start, 0), (held.cells.size, 1), (held.stride, 0))]
    pair, begin, extent = overlaps((start, size), (known[0], known[1]))
    mine, theirs = pair.T
    found = np.zeros(len(start), np.int64)
    np.add.at(found, mine, np.where(held.cells.turn[theirs] == 0, extent.prod(axis=1), 0))
    at = runs(extent, known[2][theirs] * itemsize, stride[mine] * itemsize, itemsize)
    source = held.offset[theirs] + ((begin - known[0][theirs]) * known[2][theirs]).sum(axis=1)
    target = own.offset[mine] + ((begin - start[mine]) * stride[mine]).sum(axis=1)
    theirs, mine = theirs[at.box], mine[at.box]
    key = own.number[mine] * parts + held.part[theirs]
    order = np.argsort(key, kind="stable")
    theirs, mine = theirs[order], mine[order]
    numbers = np.column_stack((at.nbytes, at.repeats, at.source_stride, at.stride))[order]
    group = Group(
        mine, mine, key[order], held.part[theirs], held.slot[theirs],
        (source[at.box] * itemsize + at.source)[order], own.slot[mine], (target[at.box] * itemsize + at.target)[order],
        numbers, held.cells.turn[theirs], held.cells.turns[theirs],
    )  # fmt: skip
    return group, bool((found == size.prod(axis=1)).all())


def _span(group: Group, keys: Ints) -> tuple[int, int]:
    first, last = np.searchsorted(group.key, keys).tolist()
    return first, last


def _is_kept(group: Group, span: slice, image: Image) -> NDArray[np.bool_]:
    """Whether (tensor, run) is real: one of several holders serves in turn, and equal needs are pulled once."""
    turn, turns = group.turn[span], group.turns[span]
    kept: NDArray[np.bool_] = np.arange(len(group.tensor))[:, None] % turns == turn
    if not image.is_simple:
        kept &= image.carried[image.needs.table.entry_of[group.slot[span], group.tensor[:, None]]]
    return kept


def _instantiate(group: Group, span: tuple[int, int], between: tuple[Holdings, Image]) -> Ints:
    """Return the rows of all tensors of a group for a span of its runs."""
    (holdings, image), own = between, slice(*span)
    source = holdings.positions(group.wanted, group.part[own], group.source_slot[own]) + group.source[own]
    target = image.bases[group.slot[own], group.tensor[:, None]] + group.target[own]
    kept = _is_kept(group, own, image)
    rows = np.empty((int(kept.sum()), 9), np.int64)
    source, target = source[kept], target[kept]
    rows[:, 0] = np.broadcast_to(group.part[own], kept.shape)[kept]
    rows[:, 1], rows[:, 2] = source >> ARENA_SHIFT, source & _OFFSET
    rows[:, 3], rows[:, 4] = target >> ARENA_SHIFT, target & _OFFSET
    rows[:, 5:] = np.broadcast_to(group.numbers[own], (*kept.shape, 4))[kept]
    return rows


def _add_nbytes(sums: Ints, group: Group, images: Sequence[Image]) -> None:
    number, part = np.divmod(group.key, sums.shape[1])
    for image in np.unique(number).tolist():
        span = slice(*np.searchsorted(number, (image, image + 1)).tolist())
        amount = group.numbers[span, 0] * group.numbers[span, 1]
        np.add.at(sums[image], part[span], _is_kept(group, span, images[image]).sum(axis=0) * amount)
