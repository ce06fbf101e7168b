"""Declare: the shards of every rank of a mesh, from placements and from how local tensors are put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from raynixl.errors import ConfigError
from raynixl.weights.fused import Assembly, Concat, Kind, Stack, assemble, kind_of
from raynixl.weights.pieces import Ints, TensorInfo, widened
from raynixl.weights.placement import Mesh, Placement
from raynixl.weights.shards import Shards, tie
from raynixl.weights.table import Geometries, Locals, Table
from raynixl.weights.tablecheck import check_table

Fused = str | Concat | Stack
Placements = Callable[[str], Sequence[Placement]] | Mapping[str, Sequence[Placement]] | Sequence[Placement]


def declare(
    infos: Sequence[TensorInfo], mesh: Mesh, placements: Placements, coordinate: Sequence[int], *,
    fused: Mapping[str, Fused] | None = None, renamed: Mapping[str, str] | None = None,
    padded: Mapping[str, Sequence[int]] | None = None, tied: Mapping[str, str] | None = None,
) -> Shards:  # fmt: skip
    """Return the shards of the rank at a coordinate of a mesh; those of other ranks are `Shards(shards.table, rank)`.

    `placements` are those of each tensor: a function or mapping of its name, or the same for all. Local tensors are
    called like their tensor, or as `renamed` says; `fused` names local tensors that are put together from several.
    `padded` gives shapes that are sharded in a tensor's place, zeros at the end. `tied` names the tensor that another
    one is: where a rank has both in one shape, they share memory.

    Raises:
        ConfigError: placements or names do not fit.
    """
    if len({info.name for info in infos}) != len(infos):
        raise ConfigError("two tensors have one name", hint="give each tensor its own name")
    names = _Names(fused or {}, renamed or {}, tied or {})
    kinds = _Kinds(mesh, placements, padded or {}, {info.name: info for info in infos})
    builder = _Builder(infos, mesh.ranks)
    for name, tree in names.locals(infos):
        builder.add(name, tree, kinds)
    table = builder.table(names.heads(infos))
    check_table(table)
    return Shards(table, mesh.rank(coordinate))


@dataclass(frozen=True, slots=True)
class _Names:
    fused: Mapping[str, Fused]
    renamed: Mapping[str, str]
    tied: Mapping[str, str]

    def locals(self, infos: Sequence[TensorInfo]) -> Iterator[tuple[str, Fused]]:
        """Yield the name of each local tensor and what it is made from, in the order of their first tensors."""
        home: dict[str, str] = {}
        for local, tree in self.fused.items():
            for leaf in leaves(tree):
                if home.setdefault(leaf, local) != local:
                    raise ConfigError(f"{leaf!r:.200} goes into {home[leaf]!r:.200} and {local!r:.200}")
        unknown = {*home, *self.renamed, *self.tied, *self.tied.values()} - {info.name for info in infos}
        if unknown:
            raise ConfigError(f"there is no tensor {min(unknown)!r:.200}", hint="fused, renamed and tied name tensors")
        seen: set[str] = set()
        for info in infos:
            local = home.get(info.name, "")
            if info.name not in home:
                yield self.renamed.get(info.name, info.name), info.name
            elif local not in seen:
                seen.add(local)
                yield local, self.fused[local]

    def heads(self, infos: Sequence[TensorInfo]) -> Ints:
        """Return for each tensor the first that it is tied with."""
        head = np.arange(len(infos))
        tie(head, infos, self.tied)
        return head


@dataclass(frozen=True)
class _Kinds:
    """Works out once what each shape and placement makes of a tensor."""

    mesh: Mesh
    placements: Placements
    padded: Mapping[str, Sequence[int]]
    infos: Mapping[str, TensorInfo]
    numbers: dict[object, int] = field(default_factory=dict)
    kinds: list[Kind] = field(default_factory=list)
    assemblies: dict[object, Assembly] = field(default_factory=dict)

    def number(self, name: str) -> int:
        own = self.infos[name].shape
        shape = tuple(self.padded[name]) if name in self.padded else own
        key = (own, shape, self._placed(name))
        found = self.numbers.get(key)
        if found is None:
            found = self.numbers[key] = len(self.kinds)
            self.kinds.append(kind_of(*key[:2], self.mesh, key[2]))
        return found

    def _placed(self, name: str) -> tuple[Placement, ...]:
        if callable(self.placements):
            return tuple(self.placements(name))
        if isinstance(self.placements, Mapping):
            if name not in self.placements:
                raise ConfigError(f"{name!r:.200} has no placement", hint="give one for each tensor")
            return tuple(self.placements[name])
        return tuple(self.placements)

    def assembly(self, tree: Fused) -> Assembly:
        """Return how a local tensor is put together; alike ones are worked out once."""
        key = self._signature(tree)
        found = self.assemblies.get(key)
        if found is None:
            numbers = iter(self.number(leaf) for leaf in leaves(tree))
            found = self.assemblies[key] = assemble(tree, self.kinds, numbers)
        return found

    def _signature(self, tree: Fused) -> object:
        if isinstance(tree, str):
            return self.number(tree)
        parts = tuple(self._signature(part) for part in tree.parts)
        return (tree.dim, tree.length, parts) if isinstance(tree, Concat) else parts


def leaves(tree: Fused) -> Iterator[str]:
    """Yield the names of the tensors in a local one, in order."""
    if isinstance(tree, str):
        yield tree
    else:
        for part in tree.parts:
            yield from leaves(part)


class _Builder:
    """Gathers local tensors into a table."""

    def __init__(self, infos: Sequence[TensorInfo], ranks: int) -> None:
        self._infos = tuple(infos)
        self._ranks = ranks
        self._number = {info.name: at for at, info in enumerate(infos)}
        self._places = [(-1, -1, 0)] * len(infos)  # entry, geometry, lead
        self._locals: list[tuple[str, str, int]] = []
        self._plain: list[int] = []
        self._geometries: dict[object, int] = {}
        self._leads: dict[bytes, int] = {np.zeros(ranks, np.int64).tobytes(): 0}
        self._forms: dict[tuple[int, bytes], int] = {}
        self._rows: list[Geometries] = []
        self._known: dict[int, tuple[int, list[tuple[int, int]]]] = {}

    def add(self, name: str, tree: Fused, kinds: _Kinds) -> None:
        """Add a local tensor."""
        made = kinds.assembly(tree)
        names = (tree,) if isinstance(tree, str) else tuple(leaves(tree))
        dtype = kinds.infos[names[0]].dtype
        if len(names) > 1 and any(kinds.infos[leaf].dtype != dtype for leaf in names):
            raise ConfigError(f"{name!r:.200} is made of tensors of several dtypes", hint="fuse equal dtypes")
        if id(made) not in self._known:
            self._known[id(made)] = (self._form(made), [self._leaf(made, at, kinds) for at in range(len(names))])
        form, found = self._known[id(made)]
        for leaf, known in zip(names, found, strict=True):
            self._places[self._number[leaf]] = (len(self._locals), *known)
        if isinstance(tree, str):
            self._plain.append(self._number[tree])
        self._locals.append((name, dtype, form))

    def _form(self, made: Assembly) -> int:
        shape = np.where(made.present[:, None], made.shape, -1)
        return self._forms.setdefault((made.dims, shape.tobytes()), len(self._forms))

    def _leaf(self, made: Assembly, at: int, kinds: _Kinds) -> tuple[int, int]:
        """Return the numbers of the geometry and of the lead of a tensor in a local one."""
        kind, lead, stride = kinds.kinds[made.kinds[at]], made.firsts[at], made.strides[at]
        lead = np.where(kind.present, lead, 0)
        leads = self._leads.setdefault(lead.tobytes(), len(self._leads))
        if not len(kind.rank):
            return -1, leads
        own = kind.stride if kind.is_flat else stride[kind.rank]
        own = np.where(kind.size > 1, own, 0)
        key = (made.kinds[at], own.tobytes())
        if key not in self._geometries:
            self._geometries[key] = number = len(self._geometries)
            numbers, slots = np.full(len(kind.rank), number), np.zeros(len(kind.rank), np.int64)
            self._rows.append(Geometries(numbers, kind.rank, slots, kind.start, kind.size, kind.offset, own))
        return self._geometries[key], leads

    def table(self, heads: Ints) -> Table:
        """Return the table; `heads` is the first of those that each tensor is tied with."""
        leads = np.array([np.frombuffer(lead, np.int64) for lead in self._leads], np.int64)
        dims = max([1, *(rows.start.shape[1] for rows in self._rows)])
        fills = {3: 0, 4: 1, 6: 0}
        blank = Geometries(*(np.zeros((0, dims) if at in fills else 0, np.int64) for at in range(7)))
        rows = [
            [widened(column, dims, fills[at]) if at in fills else column for at, column in enumerate(own)]
            for own in self._rows
        ]
        known = Geometries(*(np.concatenate(columns) for columns in zip(blank, *rows, strict=True)))
        entry_of, geometry_of, lead_of = np.array(self._places, np.int64).reshape(-1, 3).T
        places = entry_of[None, :], lead_of[None, :]
        return Table(self._infos, heads, geometry_of, known, *places, leads, self._own(heads))

    def _own(self, heads: Ints) -> Locals:
        width = max([1, *(dims for dims, _ in self._forms)])
        shapes = np.ones((len(self._forms), self._ranks, width), np.int64)
        for at, (dims, raw) in enumerate(self._forms):
            shape = np.frombuffer(raw, np.int64).reshape(self._ranks, -1)
            shapes[at, :, : max(dims, 1)] = shape
        lengths = np.array([dims for dims, _ in self._forms], np.int64)
        shape_of = np.array([form for _, _, form in self._locals], np.int64)
        tied = np.arange(len(self._locals))
        first: dict[tuple[int, int], int] = {}
        for at in sorted(self._plain):
            entry = self._places[at][0]
            key = (int(heads[at]), int(shape_of[entry]))
            tied[entry] = first.setdefault(key, entry)
        names, dtypes = tuple(name for name, _, _ in self._locals), tuple(dtype for _, dtype, _ in self._locals)
        return Locals(names, dtypes, shape_of, shapes, lengths, tied, {})
