"""Flips: how whoever pushes has replicas serve a version, each by itself and with all of its ranks or not at all."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from raynixl.errors import PeerLost, RaynixlError
from raynixl.weights.protocol import Answer, topic
from raynixl.weights.ranks import incarnation_of
from raynixl.weights.targeting import Hold, Return, Step

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.weights.targets import Targets

_HOLD_SHARE = 0.8  # of the time left; the rest is for the flip of those that hold
_FLIP_SHARE = 0.9  # of the time left is a target's: it hears of it a little later, and must not flip once given up
_SETTLED_SECONDS = 5.0
_UNDO_SECONDS = 1.0  # also where no time is left


@dataclass(slots=True)
class Flipped:
    """Who serves the version, and why others do not."""

    well: dict[str, Answer] = field(default_factory=dict)
    failed: dict[str, RaynixlError] = field(default_factory=dict)


class Flips:
    """Has replicas flip to a version by a deadline: what they have pulled, or, for `version`, what they still hold.

    A replica waits for its own readers only: all of its ranks keep theirs out (hold), and then flip. If one does not,
    none does; if one that held does not, those that flipped return. Single targets do it in one step.
    """

    def __init__(self, agent: Agent, targets: Targets, deadline: float, *, version: int = 0) -> None:
        self._agent = agent
        self._targets = targets
        self._deadline = deadline
        self._version = version

    def run(self, replicas: Sequence[Mapping[str, str]]) -> Flipped:
        """Have replicas flip, all at the same time; each names its ranks, and the push by which each has pulled."""
        single = {name: push for replica in replicas if len(replica) == 1 for name, push in replica.items()}
        works = [partial(self._together, replica) for replica in replicas if len(replica) > 1]
        if single:
            works.append(partial(self._alone, single))
        return _at_once(works)

    def _alone(self, pushes: Mapping[str, str]) -> Flipped:
        """Have targets flip of which none waits for another."""
        if not self._version:
            return self._ask("flip", pushes)
        request = Return(version=self._version, seconds=self._left(_FLIP_SHARE)).to_bytes()
        return self._answers("return", dict.fromkeys(pushes, request), self._deadline)

    def _together(self, pushes: Mapping[str, str]) -> Flipped:
        """Have the ranks of one replica flip together."""
        pact = secrets.token_hex(16)
        held = self._hold(pushes, pact)
        if held.failed:
            self._tell("let-go", pushes)  # also those that answered too late, or not at all
            culprit = next(name for name in pushes if name in held.failed)
            return Flipped(failed={name: held.failed.get(name, held.failed[culprit]) for name in pushes})
        done = self._ask("flip", pushes)
        if done.failed:
            return self._taken_back(pushes, done)
        self._tell("let-go", pushes)
        return done

    def _hold(self, pushes: Mapping[str, str], pact: str) -> Flipped:
        left = self._left(_HOLD_SHARE)
        steps = {
            name: Hold(push=push, pact=pact, seconds=left, version=self._version, ranks=tuple(pushes)).to_bytes()
            for name, push in pushes.items()
        }
        return self._answers("hold", steps, time.monotonic() + left)

    def _taken_back(self, pushes: Mapping[str, str], done: Flipped) -> Flipped:
        """Have ranks that flipped serve their old version again: another one of their replica did not flip."""
        self._tell("undo", {name: push for name, push in pushes.items() if name in done.failed})  # it may flip late
        seconds = max(_UNDO_SECONDS, self._left())
        steps = {name: Step(push=pushes[name], seconds=seconds).to_bytes() for name in done.well}
        back = self._answers("undo", steps, time.monotonic() + seconds).well
        culprit = next(name for name in pushes if name in done.failed)
        failed = dict(done.failed)
        for name in done.well:
            where = "is back on its old version" if name in back else "serves the new version"
            failed[name] = PeerLost(
                f"{name!r} {where}: {culprit!r} of its replica did not flip",
                hint=f"see why {culprit!r} did not, and push again", peer=culprit,
            )  # fmt: skip
        return Flipped(failed=failed)

    def _ask(self, phase: str, pushes: Mapping[str, str]) -> Flipped:
        seconds = self._left(_FLIP_SHARE)
        steps = {name: Step(push=push, seconds=seconds).to_bytes() for name, push in pushes.items()}
        return self._answers(phase, steps, self._deadline)

    def _answers(self, phase: str, payloads: Mapping[str, bytes], deadline: float) -> Flipped:
        return Flipped(*self._targets.answers(self._targets.ask(phase, payloads, deadline)))

    def _tell(self, phase: str, pushes: Mapping[str, str]) -> None:
        """Say something to which no answer is waited for."""
        for name, push in pushes.items():
            if not incarnation_of(self._agent, name):
                continue  # it is gone; to look for it would take time
            step = Step(push=push, seconds=_SETTLED_SECONDS).to_bytes()
            with contextlib.suppress(RaynixlError):  # it is gone by now
                self._agent.ask(name, topic(self._targets.name, phase), step, timeout=_SETTLED_SECONDS)

    def _left(self, share: float = 1.0) -> float:
        return max(0.001, (self._deadline - time.monotonic()) * share)


def _at_once(works: Sequence[Callable[[], Flipped]]) -> Flipped:
    """Do all works at the same time; return what they found together.

    Raises:
        BaseException: the first that one of them raised, once all are over.
    """
    found: list[Flipped | BaseException] = []

    def do(work: Callable[[], Flipped]) -> None:
        try:
            found.append(work())
        except BaseException as exc:  # noqa: BLE001 - thread edge: raised below
            found.append(exc)

    helpers = [threading.Thread(target=do, args=(work,), name="raynixl-flip", daemon=True) for work in works[1:]]
    for helper in helpers:
        helper.start()
    for work in works[:1]:
        do(work)
    for helper in helpers:
        helper.join()
    total = Flipped()
    for one in found:
        if isinstance(one, BaseException):
            raise one
        total.well |= one.well
        total.failed |= one.failed
    return total
