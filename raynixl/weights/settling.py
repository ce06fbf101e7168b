"""Settling: the ranks of a replica end a flip among themselves where whoever pushes is gone in the midst of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from raynixl.errors import RaynixlError, TransferTimeout
from raynixl.weights.conversation import ask_all
from raynixl.weights.pact import Pact, Stage
from raynixl.weights.protocol import topic
from raynixl.weights.ranks import incarnation_of
from raynixl.weights.targeting import Settle

if TYPE_CHECKING:
    from raynixl.agents import Agent

_LOOK_SECONDS = 0.1  # how often it is looked whether whoever pushes is there
_ASK_SECONDS = 1.0
_SETTLE_SECONDS = 5.0  # for which a rank that does not answer, but is not gone either, is asked
_REMEMBERED = 8  # flips: a rank that was frozen asks late how they ended


class Settling:
    """The pacts of one target. `conclude` does what is left to do at this rank: flip, or go back, as it is told."""

    def __init__(self, agent: Agent, name: str, conclude: Callable[[Pact, Stage], None]) -> None:
        self._agent = agent
        self._name = name
        self._conclude = conclude
        self._lock = threading.Lock()  # protects _pacts
        self._pacts: dict[str, Pact] = {}

    def begin(self, pact: Pact) -> None:
        """Watch a flip for which this rank holds from now on; those before are over."""
        self.end()
        with self._lock:
            self._pacts[pact.terms.name] = pact
            while len(self._pacts) > _REMEMBERED:
                del self._pacts[next(iter(self._pacts))]
        threading.Thread(target=self._watch, args=(pact,), name="raynixl-pact", daemon=True).start()

    @property
    def last(self) -> Pact | None:
        """The last flip of a replica that this rank held for."""
        with self._lock:
            return next(reversed(self._pacts.values()), None)

    def of(self, push: str) -> Pact | None:
        """Return the flip of a push, if it is the last one of a replica."""
        last = self.last
        return last if last is not None and last.terms.push == push else None

    def finish(self) -> None:
        """Have the last flip settled now if this rank still holds for it: something else is to begin."""
        last = self.last
        if last is not None and last.stage is Stage.HELD:
            last.claim()
            last.wait_over(2 * _SETTLE_SECONDS)
        self.end()

    def end(self) -> None:
        """Note that nothing is to be settled any more."""
        last = self.last
        if last is not None:
            last.end()

    def answer(self, _peer: str, payload: bytes) -> bytes:
        """Tell another rank how far this one is with a flip."""
        question = Settle.from_bytes(payload)
        with self._lock:
            pact = self._pacts.get(question.pact)
        stage = Stage.UNKNOWN if pact is None else pact.asked(question.stage)
        return Settle(pact=question.pact, stage=stage).to_bytes()

    def _watch(self, pact: Pact) -> None:
        """Wait until whoever pushes says that all have flipped, or is gone."""
        name, life = pact.terms.leader
        while not pact.wait(_LOOK_SECONDS):
            if time.monotonic() >= pact.terms.until or incarnation_of(self._agent, name) != life:
                break
        if not pact.is_over:
            pact.claim()
            self._conclude(pact, pact.settle(self._heard(pact)))
            pact.end()

    def _heard(self, pact: Pact) -> Collection[Stage]:
        """Return what the other ranks say; who is gone says nothing, and who is slow is asked again for some time."""
        heard: dict[str, Stage] = {}
        end = time.monotonic() + _SETTLE_SECONDS
        where = topic(self._name, "settle")
        while missing := [name for name in pact.terms.others if name not in heard]:
            now = time.monotonic()
            if now >= end or pact.is_over:
                break
            question = Settle(pact=pact.terms.name, stage=pact.stage).to_bytes()
            answers = ask_all(self._agent, where, dict.fromkeys(missing, question), min(end, now + _ASK_SECONDS))
            heard |= {name: stage for name, answer in answers.items() if (stage := _said(answer)) is not Stage.FLIPPING}
        return heard.values()


def _said(answer: bytes | RaynixlError) -> Stage:
    """Return what an answer says, FLIPPING if it is to be asked for again."""
    try:
        if isinstance(answer, bytes):
            return Settle.from_bytes(answer).stage
    except RaynixlError:
        return Stage.UNKNOWN
    return Stage.FLIPPING if isinstance(answer, TransferTimeout) else Stage.UNKNOWN
