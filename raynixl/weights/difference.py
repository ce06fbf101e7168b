"""Differences: what keeps a source's tensors from going into a target's, as a table that people read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raynixl.weights.layout import Entry, Layout, shape_text

MAX_ROWS = 20
_MAX_CELL = 60


DTYPE_DIFFERS = "dtype differs"
"""The reason of a tensor that a cast would make fit."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that does not fit, as it is on either side."""

    name: str
    source: str
    target: str
    reason: str


def difference(source: Layout, target: Layout) -> list[Difference]:
    """Return what does not fit, in the source's order. Order and place do not matter, names and ties do.

    A tie at the source alone is no difference; one at the target alone is, for one memory cannot hold two values.
    """
    found = [_missing(entry, target) or _unlike(entry, target.by_name[entry.name]) for entry in source.entries]
    rows = [row for row in found if row is not None]
    missing = [entry for entry in target.entries if entry.name not in source.by_name]
    rows += [Difference(e.name, "-", shape_text(e.dtype, e.shape), "missing at the source") for e in missing]
    return rows + _untied(source, target)


def table(rows: Sequence[Difference]) -> str:
    """Render differences as a table, the first few of many."""
    cells = [("name", "source", "target", "")] + [(r.name, r.source, r.target, r.reason) for r in rows[:MAX_ROWS]]
    short = [tuple(_cut(cell) for cell in row) for row in cells]
    widths = [max(len(row[column]) for row in short) for column in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in short
    ]
    if len(rows) > MAX_ROWS:
        lines.append(f"... and {len(rows) - MAX_ROWS} more")
    return "\n".join(f"  {line}" for line in lines)


def _cut(text: str) -> str:
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return printable if len(printable) <= _MAX_CELL else f"{printable[:20]}...{printable[-37:]}"


def _missing(entry: Entry, target: Layout) -> Difference | None:
    if entry.name in target.by_name:
        return None
    return Difference(entry.name, shape_text(entry.dtype, entry.shape), "-", "unexpected: the target has none")


def _unlike(ours: Entry, theirs: Entry) -> Difference | None:
    what = [
        label
        for label, differs in (("shape", ours.shape != theirs.shape), ("dtype", ours.dtype != theirs.dtype))
        if differs
    ]
    if not what:
        return None
    cells = shape_text(ours.dtype, ours.shape), shape_text(theirs.dtype, theirs.shape)
    return Difference(ours.name, *cells, f"{' and '.join(what)} {'differs' if len(what) == 1 else 'differ'}")


def _untied(source: Layout, target: Layout) -> list[Difference]:
    """Find tensors that share memory at the target but not, or not so, at the source."""
    heads: dict[object, Entry] = {}
    rows = []
    for entry in target.entries:
        ours = source.by_name.get(entry.name)
        if ours is None or entry.nbytes == 0:
            continue
        head = heads.setdefault(entry.place, entry)
        if head is not entry and source.by_name[head.name].place != ours.place:
            rows.append(_tie(entry, head))
        elif entry.sharing:
            head = heads.setdefault(("cluster", entry.sharing[0]), entry)
            if head is not entry and not is_same_view(source.by_name[head.name], ours, head, entry):
                rows.append(_tie(entry, head))
    return rows


def is_same_view(head: Entry, entry: Entry, their_head: Entry, theirs: Entry) -> bool:
    """Say whether two tensors overlap at the source just as they do at the target."""
    if not head.sharing or not entry.sharing or head.sharing[0] != entry.sharing[0]:
        return False
    ours = (entry.sharing[1] - head.sharing[1], head.sharing[2:], entry.sharing[2:])
    return ours == (theirs.sharing[1] - their_head.sharing[1], their_head.sharing[2:], theirs.sharing[2:])


def _tie(entry: Entry, head: Entry) -> Difference:
    return Difference(entry.name, "apart", f"shares memory with {head.name}", "tied at the target alone")
