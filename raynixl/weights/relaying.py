"""Relaying: the messages between a receiver in a relay and whoever pushes; there are many, so they are binary."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from raynixl.errors import IntegrityError
from raynixl.record import MAX_NAME_CHARS, parse
from raynixl.weights.assignment import Why
from raynixl.weights.protocol import LIMIT, Fault, Holder, Wire
from raynixl.weights.sourcing import MAX_CHUNKS

MAX_ROOM = 4096
_NEXT = struct.Struct("<4s?xHIIII")  # magic, is_delta, failures, room, done, bytes of their holders, of the own one
_BATCH = struct.Struct("<4sIII")  # magic, chunks, bytes of their holders, of the rest
_NEXT_MAGIC, _BATCH_MAGIC = b"RXN1", b"RXB1"
_WHYS = tuple(Why)


@dataclass(frozen=True, slots=True)
class Failed:
    """A chunk that did not come: from whom, and why."""

    chunk: int
    holder: str
    why: Why


@dataclass(frozen=True, slots=True)
class Next:
    """From a target in a relay: what became of its chunks, and how many more it takes. The first names its slot.

    They are chunks of the delta or of the image.
    """

    done: Sequence[int] = ()
    failed: Sequence[Failed] = ()
    room: int = 0
    holder: Holder | None = None
    is_delta: bool = False

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        own = b"" if self.holder is None else self.holder.to_bytes()
        names = _packed([one.holder for one in self.failed])
        numbers = [*self.done, *(one.chunk for one in self.failed), *(_WHYS.index(one.why) for one in self.failed)]
        head = _NEXT.pack(
            _NEXT_MAGIC, self.is_delta, len(self.failed), self.room, len(self.done), len(names), len(own)
        )  # fmt: skip
        return b"".join((head, struct.pack(f"<{len(numbers)}I", *numbers), names, own))

    @staticmethod
    def from_bytes(data: bytes) -> Next:
        """Parse what a receiver sent.

        Raises:
            IntegrityError: it is malformed.
        """
        _check(data, _NEXT, _NEXT_MAGIC)
        _, is_delta, failures, room, done, names, own = _NEXT.unpack_from(data)
        if done > MAX_CHUNKS or room > MAX_ROOM:
            raise _malformed("it names too many chunks")
        numbers, at = _numbers(data, _NEXT.size, done + 2 * failures)
        if len(data) != at + names + own:
            raise _malformed("it has another length than it says")
        failed: tuple[Failed, ...] = ()
        if failures:
            holders = _texts(data[at : at + names], failures)
            chunks, whys = numbers[done : done + failures], numbers[done + failures :]
            if max(whys) >= len(_WHYS):
                raise _malformed("it gives no known reason")
            failed = tuple(
                Failed(chunk, holder, _WHYS[why]) for chunk, holder, why in zip(chunks, holders, whys, strict=True)
            )
        holder = Holder.from_bytes(data[at + names :]) if own else None
        return Next(numbers[:done], failed, room, holder, is_delta)


@dataclass(frozen=True, slots=True)
class Batch:
    """To a target in a relay: chunks to pull and from whom, where these lie, and an error if it is all over."""

    chunks: Sequence[tuple[int, str]] = ()
    holders: Sequence[Holder] = ()
    fault: Fault | None = None

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        rest = b""
        if self.holders or self.fault is not None:
            rest = _Rest(holders=tuple(self.holders), fault=self.fault).to_bytes()
        names = _packed([holder for _, holder in self.chunks])
        numbers = struct.pack(f"<{len(self.chunks)}I", *[chunk for chunk, _ in self.chunks])
        return b"".join((_BATCH.pack(_BATCH_MAGIC, len(self.chunks), len(names), len(rest)), numbers, names, rest))

    @staticmethod
    def from_bytes(data: bytes) -> Batch:
        """Parse what whoever pushes sent.

        Raises:
            IntegrityError: it is malformed.
        """
        _check(data, _BATCH, _BATCH_MAGIC)
        _, count, names, rest = _BATCH.unpack_from(data)
        numbers, at = _numbers(data, _BATCH.size, count)
        if len(data) != at + names + rest:
            raise _malformed("it has another length than it says")
        chunks = list(zip(numbers, _texts(data[at : at + names], count), strict=True))
        if not rest:
            return Batch(chunks)
        more = parse(_Rest, data[at + names :], what="Batch", limit=LIMIT)
        return Batch(chunks, more.holders, more.fault)


class _Rest(Wire):
    """What few batches have."""

    holders: Annotated[tuple[Holder, ...], Field(strict=False, max_length=65_536)]
    fault: Fault | None


def _check(data: bytes, head: struct.Struct, magic: bytes) -> None:
    if not head.size <= len(data) <= LIMIT or not data.startswith(magic):
        raise _malformed("it is no message of this kind")


def _numbers(data: bytes, at: int, count: int) -> tuple[list[int], int]:
    """Return so many numbers, and where they end."""
    end = at + 4 * count
    if end > len(data):
        raise _malformed("it is truncated")
    return list(struct.unpack_from(f"<{count}I", data, at)), end


def _packed(names: Sequence[str]) -> bytes:
    """Return names as bytes; no agent's name has a line feed, and the sources' is empty."""
    return "\n".join(names).encode()


def _texts(data: bytes, count: int) -> list[str]:
    if not count and not data:
        return []
    try:
        found = data.decode().split("\n")
    except UnicodeDecodeError as exc:
        raise _malformed(str(exc)) from exc
    if len(found) != count or max(map(len, found)) > MAX_NAME_CHARS:
        raise _malformed("its names are not those of agents")
    return found


def _malformed(why: str) -> IntegrityError:
    return IntegrityError(
        f"a message of a relay is malformed: {why}", hint="it is truncated or not from this raynixl"
    )  # fmt: skip


__all__ = ["Batch", "Failed", "Next"]
