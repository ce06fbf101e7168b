"""Holders of an object of Ray Direct Transport: who else has its bytes, asked of its source or, without it, of all."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raynixl.errors import IntegrityError, RaynixlError, RegionUnknown
from raynixl.integrations.rdt_memory import Holding

if TYPE_CHECKING:
    from raynixl.agents import Agent

FIND, JOIN, LEAVE = "raynixl/rdt/find", "raynixl/rdt/join", "raynixl/rdt/leave"
ASK_SECONDS = 2.0
_MAX_HOLDERS = 4096


@dataclass(slots=True)
class _Object:
    """An object that this process can give, and who else can."""

    holding: Holding
    data: bytes
    others: dict[str, bytes] = field(default_factory=dict)
    turn: Iterator[int] = field(default_factory=itertools.count)


class Holders:
    """Answers for the objects of this process, and asks others for theirs."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._lock = threading.Lock()  # protects _objects
        self._objects: dict[str, _Object] = {}
        agent.serve(FIND, self._on_find, threaded=False)
        agent.serve(JOIN, self._on_join, threaded=False)
        agent.serve(LEAVE, self._on_leave, threaded=False)

    def add(self, object_id: str, holding: Holding) -> None:
        """Give an object from now on."""
        with self._lock:
            self._objects[object_id] = _Object(holding, holding.to_bytes())

    def remove(self, object_id: str) -> None:
        """Give an object no more."""
        with self._lock:
            self._objects.pop(object_id, None)

    def join(self, source: str, object_id: str, holding: Holding) -> None:
        """Tell an object's source that this process has its bytes, too."""
        head = json.dumps([object_id]).encode()
        self._agent.ask(source, JOIN, head + b"\n" + holding.to_bytes(), timeout=ASK_SECONDS).wait()

    def leave(self, source: str, object_id: str) -> None:
        """Tell an object's source that this process has its bytes no more."""
        self._agent.ask(source, LEAVE, json.dumps([object_id]).encode(), timeout=ASK_SECONDS).wait()

    def next(self, source: str, object_id: str) -> Holding | None:
        """Return whom the source would have us read from; None for itself."""
        answer = self._agent.ask(source, FIND, json.dumps([object_id]).encode(), timeout=ASK_SECONDS).wait()
        return Holding.from_bytes(answer) if answer else None

    def search(self, object_id: str, without: set[str]) -> Iterator[Holding]:
        """Ask every agent of the job but some for the object, and yield what they have of it."""
        directory = self._agent.directory
        names = [] if directory is None else [record.name for record in directory.list()]
        asked = {}
        for name in names:
            if name != self._agent.name and name not in without:
                try:
                    asked[name] = self._agent.ask(name, FIND, json.dumps([object_id, 0]).encode(), timeout=ASK_SECONDS)
                except RaynixlError:  # it is gone, too: it has nothing for us
                    continue
        for reply in asked.values():
            try:
                yield Holding.from_bytes(reply.wait())
            except RaynixlError:  # it has no such object, or is gone
                continue

    def _on_find(self, _peer: str, payload: bytes) -> bytes:
        """Answer with a holding: the next in turn, ours as nothing; or ours in full where that is asked."""
        object_id, *rest = _parse(payload)
        with self._lock:
            known = self._objects.get(object_id)
            if known is None:
                raise RegionUnknown(f"{self._agent.name!r} has no object {object_id}", hint="it went out of scope")
            if rest:
                return known.data
            everyone = [b"", *known.others.values()]
            return everyone[next(known.turn) % len(everyone)]

    def _on_join(self, peer: str, payload: bytes) -> bytes:
        head, _, body = payload.partition(b"\n")
        holding = Holding.from_bytes(body)
        if holding.agent != peer:
            raise IntegrityError(f"{peer!r} speaks for {holding.agent!r}", hint="report this")
        with self._lock:
            known = self._objects.get(_parse(head)[0])
            if known is None or len(known.others) >= _MAX_HOLDERS:
                raise RegionUnknown(f"{self._agent.name!r} has no object to hold", hint="it went out of scope")
            if [part.region < 0 for part in holding.parts] != [part.region < 0 for part in known.holding.parts]:
                raise IntegrityError("the holder has other tensors than the source", hint="hold what came by the ref")
            known.others[peer] = body
        return b""

    def _on_leave(self, peer: str, payload: bytes) -> bytes:
        with self._lock:
            known = self._objects.get(_parse(payload)[0])
            if known is not None:
                known.others.pop(peer, None)
        return b""


def _parse(payload: bytes) -> list[str]:
    try:
        fields = json.loads(payload)
    except ValueError as exc:
        raise IntegrityError("a question about an object is malformed", hint="it is not from raynixl") from exc
    if not isinstance(fields, list) or not fields or not isinstance(fields[0], str):
        raise IntegrityError("a question about an object is malformed", hint="it is not from raynixl")
    return fields
