"""Asking: questions to the sessions of other ranks, several at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from raynixl.errors import PeerRestarted, RaynixlError
from raynixl.moe.view import Answer, Ask

if TYPE_CHECKING:
    from raynixl.agents import Agent

MOST_AT_ONCE: Final = 16
Answers = dict[int, "Answer | RaynixlError"]


class Asking:
    """Asks other ranks; `names` tells who they are."""

    def __init__(self, agent: Agent, topic: str, names: Callable[[], list[str]]) -> None:
        self._agent, self._topic, self._names = agent, topic, names

    def one(self, rank: int, ask: Ask, timeout: float, token: str | None = None) -> Answer | RaynixlError:
        """Return a rank's answer, or why there is none; with a token, that session's and nobody else's."""
        try:
            reply = self._agent.peer(self._names()[rank]).ask(self._topic, ask.to_bytes(), timeout=timeout)
            answer = Answer.from_bytes(reply.wait())
        except RaynixlError as exc:
            return exc
        if answer.rank != rank or (token is not None and answer.token != token):
            name = self._names()[rank]
            return PeerRestarted(f"{name!r} has begun anew as rank {answer.rank}", hint="ask it again", peer=name)
        return answer

    def all(self, asks: Mapping[int, tuple[Ask, str | None]], timeout: float) -> Answers:
        """Ask several ranks at once, each with the token of the session that is meant."""
        if len(asks) < 2:
            return {rank: self.one(rank, ask, timeout, token) for rank, (ask, token) in asks.items()}
        with ThreadPoolExecutor(min(MOST_AT_ONCE, len(asks)), thread_name_prefix="raynixl-moe-ask") as pool:
            pending = {rank: pool.submit(self.one, rank, ask, timeout, token) for rank, (ask, token) in asks.items()}
            return {rank: future.result() for rank, future in pending.items()}

    def tell(self, rank: int, ask: Ask) -> None:
        """Say something to a rank that is connected, and do not wait for its answer."""
        connection = self._agent.connector.current(self._names()[rank])
        if connection is None or connection.lost is not None:
            return
        try:
            self._agent.ask(self._names()[rank], self._topic, ask.to_bytes())
        except RaynixlError:
            return  # it is gone, or goes just now

    def is_lost(self, rank: int) -> bool:
        """Whether the connection with a rank is known to be lost."""
        return self._agent.lost(self._names()[rank]) is not None
