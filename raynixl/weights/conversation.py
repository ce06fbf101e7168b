"""Conversations: one question to many peers at once, and one answer or error from each by the deadline."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from raynixl.errors import PeerLost, PeerUnknown, RaynixlError, RegionUnknown, TransferTimeout

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.agents.reply import Reply

NOT_YET = (PeerUnknown, PeerLost, RegionUnknown)
"""What a peer that is just starting answers: not published, listed but not listening, nothing served yet."""


_LOOK_SECONDS = 0.02
"""How often it is looked who else has answered, while one peer has not."""


def ask_all(
    agent: Agent, topic: str, payloads: Mapping[str, bytes], deadline: float, *, until: float = 0.0
) -> dict[str, bytes | RaynixlError]:
    """Ask every peer of `payloads` at once; return what each answered, or why it did not.

    Until the monotonic time `until`, peers that are just starting are asked again.
    """
    replies: dict[str, Reply | RaynixlError] = {}
    results: dict[str, bytes | RaynixlError] = {}
    waiting = {}
    for name, payload in payloads.items():
        if agent.lost(name) is None and _is_connected(agent, name):
            replies[name] = _send(agent, name, topic, payload, deadline)
        else:
            waiting[name] = _Newcomer(agent, topic, payload, deadline=deadline, until=until)
            waiting[name].start(name)
    for name in payloads:
        results[name] = waiting[name].result(name) if name in waiting else _wait(replies[name], deadline)
    late = {name: payloads[name] for name in replies if isinstance(results[name], NOT_YET)}
    if late and time.monotonic() < until:
        for name, payload in late.items():
            waiting[name] = _Newcomer(agent, topic, payload, deadline=deadline, until=until)
            waiting[name].start(name)
        results.update({name: waiting[name].result(name) for name in late})
    return results


class Asking:
    """Questions to peers under one topic, by a deadline; more may be asked while others are not answered yet."""

    def __init__(self, agent: Agent, topic: str, deadline: float) -> None:
        self._agent = agent
        self._topic = topic
        self.deadline = deadline
        self._replies: dict[str, Reply | RaynixlError] = {}

    @property
    def open(self) -> tuple[str, ...]:
        """Who has not answered yet."""
        return tuple(self._replies)

    def ask(self, payloads: Mapping[str, bytes]) -> None:
        """Ask every peer of `payloads` at once."""
        for name, payload in payloads.items():
            self._replies[name] = _send(self._agent, name, self._topic, payload, self.deadline)

    def give_up(self, names: Iterable[str]) -> None:
        """Wait for these no more."""
        for name in names:
            self._replies.pop(name, None)

    def collect(self) -> dict[str, bytes | RaynixlError]:
        """Return what has come; nothing, if that is so, after a moment."""
        first = next(iter(self._replies.values()), None)
        if first is not None and not isinstance(first, RaynixlError) and not first.done:
            with contextlib.suppress(RaynixlError):  # it is asked again below
                first.wait(_LOOK_SECONDS)
        replies = self._replies
        over = {name: reply for name, reply in replies.items() if isinstance(reply, RaynixlError) or reply.done}
        for name in over:
            del replies[name]
        return {name: _wait(reply, self.deadline) for name, reply in over.items()}


class _Newcomer:
    """A peer that must be connected first, which may take long: it gets a thread of its own."""

    def __init__(self, agent: Agent, topic: str, payload: bytes, *, deadline: float, until: float) -> None:
        self._agent = agent
        self._topic = topic
        self._payload = payload
        self._deadline = deadline
        self._until = until
        self._result: bytes | RaynixlError | None = None
        self._ended = threading.Event()

    def start(self, name: str) -> None:
        threading.Thread(target=self._run, args=(name,), name="raynixl-ask", daemon=True).start()

    def result(self, name: str) -> bytes | RaynixlError:
        self._ended.wait(max(0.0, self._deadline - time.monotonic()) + 1.0)
        if self._result is None:
            return TransferTimeout(f"peer {name!r} could not be connected in time", peer=name)
        return self._result

    def _run(self, name: str) -> None:
        pause = 0.005
        try:
            while True:
                result = _wait(_send(self._agent, name, self._topic, self._payload, self._deadline), self._deadline)
                if not isinstance(result, NOT_YET) or time.monotonic() + pause > self._until:
                    self._result = result
                    return
                time.sleep(pause)  # nothing announces that a peer starts to serve: ask again, ever less often
                pause = min(0.1, pause * 2)
        finally:
            self._ended.set()


def _is_connected(agent: Agent, name: str) -> bool:
    connection = agent.connector.current(name)
    return connection is not None and connection.lost is None


def _send(agent: Agent, name: str, topic: str, payload: bytes, deadline: float) -> Reply | RaynixlError:
    try:
        return agent.ask(name, topic, payload, timeout=max(0.001, deadline - time.monotonic()))
    except RaynixlError as exc:
        return exc


def _wait(reply: Reply | RaynixlError, deadline: float) -> bytes | RaynixlError:
    if isinstance(reply, RaynixlError):
        return reply
    try:
        return reply.wait(max(0.0, deadline - time.monotonic()))
    except RaynixlError as exc:
        return exc
