"""Targets: those that follow the weights, as whoever pushes sees them: what they need, hold and serve, and where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from raynixl.errors import IntegrityError, PeerRestarted, RaynixlError, RegionUnknown
from raynixl.weights.conversation import ask_all
from raynixl.weights.plan import Plan
from raynixl.weights.protocol import Answer, topic
from raynixl.weights.ranks import Errors, fetch_tables, incarnation_of, parsed
from raynixl.weights.shards import Shards
from raynixl.weights.table import Table
from raynixl.weights.targeting import Describe, Held, Incoming, Subscribed

if TYPE_CHECKING:
    from raynixl.agents import Agent

T = TypeVar("T")


@dataclass(slots=True)
class Target:
    """What is known of a target: in which life of it, what it needs, and the version that it serves."""

    incarnation: str
    shards: Shards
    host: str
    version: int
    held: tuple[Held, ...]
    told: set[str] = field(default_factory=set)


class NotTold(PeerRestarted):
    """A target does not know the plan: it subscribed anew since it was told, or has forgotten it."""


class Targets:
    """The targets of the weights under a name, in replicas that flip together. One push at a time uses them."""

    def __init__(self, agent: Agent, name: str, replicas: Sequence[tuple[str, ...]]) -> None:
        self.name = name
        self.replicas = list(replicas)
        self._agent = agent
        self._known: dict[str, Target] = {}
        self._last: dict[str, int] = {}
        self._tables: dict[str, Table] = {}
        self._heard: set[str] = set()

    def __repr__(self) -> str:
        return f"Targets({self.name!r}, {len(self.replicas)} replicas)"

    @property
    def names(self) -> tuple[str, ...]:
        """All targets, in order."""
        return tuple(name for replica in self.replicas for name in replica)

    def __getitem__(self, name: str) -> Target:
        return self._known[name]

    def get(self, name: str) -> Target | None:
        """Return what is known of a target in its present life."""
        return self._known[name] if self._is_known(name) else None

    def forget(self, names: Iterable[str]) -> None:
        """Ask these again before anything else."""
        for name in names:
            self._last[name] = self.last_version(name)
            self._known.pop(name, None)

    def adopt(self, others: Targets) -> None:
        """Have the targets of others follow, with what is known of them."""
        self.replicas = self.replicas + others.replicas
        self._known |= others._known
        self._tables |= others._tables
        self._heard |= others._heard

    def last_version(self, name: str) -> int:
        """Return the version that a target served when it was last heard of, maybe in another life, or 0."""
        return self._known[name].version if name in self._known else self._last.get(name, 0)

    def describe(self, names: Sequence[str], request: Describe, deadline: float, *, until: float = 0.0) -> Errors:
        """Ask targets that are new or restarted what they need; return those that do not answer, and why."""
        fresh = [name for name in names if not self._is_known(name)]
        answers = self.ask("target", dict.fromkeys(fresh, request.to_bytes()), deadline, until=until)
        found, failed = parsed(answers, Subscribed.from_bytes)
        for name, one in list(found.items()):
            if one.fault is not None:
                failed[name] = one.fault.error()
                del found[name]
        failed |= self._fetch_tables(found, deadline)
        for name, one in found.items():
            if name in failed:
                continue
            try:
                shards = Shards.at(self._tables[one.table], one.rank)
            except IntegrityError as exc:
                failed[name] = exc
                continue
            self._known[name] = Target(self._incarnation(name), shards, one.host, one.version, one.held)
        return failed

    def tell(self, plan: Plan, image_of: Mapping[str, int], chunk_nbytes: int, deadline: float) -> Errors:
        """Send targets what they pull from whom under a plan, where they were not told yet; return who failed."""
        key = plan.key(chunk_nbytes)
        fresh = [name for name in image_of if key not in self._known[name].told]
        messages: dict[int, bytes] = {}
        for image in {image_of[name] for name in fresh}:
            layout, ranges = plan.images[image].to_bytes(), plan.incoming(image).to_bytes()
            messages[image] = Incoming(key, image, chunk_nbytes, layout, ranges).to_bytes()
        payloads = {name: messages[image_of[name]] for name in fresh}
        told, failed = parsed(self.ask("incoming", payloads, deadline), bytes)
        for name in told:
            self._known[name].told.add(key)
        return failed

    def ask(
        self, phase: str, payloads: Mapping[str, bytes], deadline: float, *, until: float = 0.0
    ) -> dict[str, bytes | RaynixlError]:
        """Ask targets; those never heard of get until `until` to start."""
        where = topic(self.name, phase)
        new = {name: payload for name, payload in payloads.items() if name not in self._heard}
        old = {name: payload for name, payload in payloads.items() if name in self._heard}
        answers = ask_all(self._agent, where, old, deadline)
        answers |= ask_all(self._agent, where, new, deadline, until=until)
        self._heard.update(name for name, answer in answers.items() if isinstance(answer, bytes))
        return {name: self.explained(name, answer) for name, answer in answers.items()}

    def explained(self, name: str, answer: bytes | RaynixlError) -> bytes | RaynixlError:
        """Say in the words of weight sync that a target does not take part."""
        if not isinstance(answer, RegionUnknown):
            return answer
        return RegionUnknown(
            f"{name!r} does not subscribe to the weights {self.name!r}",
            hint=f"call rx.subscribe({self.name!r}, module) there, and keep what it returns open", peer=name,
        )  # fmt: skip

    def answers(self, answers: Mapping[str, bytes | RaynixlError]) -> tuple[dict[str, Answer], Errors]:
        """Return the answers of targets that did well, and why the others did not."""
        found, failed = parsed(answers, Answer.from_bytes)
        for name, answer in found.items():
            if answer.fault is not None:
                failed[name] = answer.fault.error()
            elif answer.has_forgotten:
                failed[name] = NotTold(f"{name!r} was not told of this plan", hint="push again", peer=name)
        return {name: answer for name, answer in found.items() if name not in failed}, failed

    def _incarnation(self, name: str) -> str:
        return incarnation_of(self._agent, name)

    def _is_known(self, name: str) -> bool:
        known = self._known.get(name)
        return known is not None and known.incarnation == self._incarnation(name)

    def _fetch_tables(self, found: Mapping[str, Subscribed], deadline: float) -> Errors:
        wanted = {name: one.table for name, one in found.items()}
        return fetch_tables(self._tables, wanted, lambda asked: self.ask("table", asked, deadline))
