"""Origins: the sources of a push as whoever pushes sees them: what they hold, what they serve, what they froze."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from raynixl.errors import IntegrityError, PeerLost, PeerRestarted, RaynixlError, RegionUnknown
from raynixl.weights.assembly import Assembled, assemble
from raynixl.weights.conversation import ask_all
from raynixl.weights.plan import Plan
from raynixl.weights.protocol import topic
from raynixl.weights.ranks import Answers, Errors, fetch_tables, incarnation_of, parsed
from raynixl.weights.shards import Shards
from raynixl.weights.sourcing import Described, Freeze, Frozen, ImageRows, Outgoing, Release
from raynixl.weights.stopped import ask_running
from raynixl.weights.table import Table, pack

if TYPE_CHECKING:
    from raynixl.agents import Agent

T = TypeVar("T")
_RELEASE_SECONDS = 1.0


@dataclass(slots=True)
class _Origin:
    """What is known of a source: in which life of it, which shards, which plans it was told."""

    incarnation: str
    described: Described
    shards: Shards
    arenas: list[int]
    told: set[str] = field(default_factory=set)


class ShardsChanged(PeerRestarted):
    """Sources hold other shards than the plan was made of: it must be made again."""


class Origins:
    """The sources of the weights under a name. Not safe in threads: one push at a time asks them."""

    def __init__(self, agent: Agent, name: str, sources: Sequence[str]) -> None:
        self.name = name
        self.sources = tuple(sources)
        self._agent = agent
        self._known: dict[str, _Origin] = {}
        self._tables: dict[str, Table] = {}
        self._rows: dict[tuple[str, int], tuple[ImageRows, ...]] = {}  # (plan, part) -> what it serves

    def __repr__(self) -> str:
        return f"Origins({self.name!r}, {len(self._known)} of {len(self.sources)} known)"

    def forget(self) -> None:
        """Ask all sources again before anything else."""
        self._known.clear()

    @property
    def planned(self) -> dict[str, Shards]:
        """The shards of the sources that were ever described, in order, for the plan; some may be gone by now."""
        return {name: self._known[name].shards for name in self.sources if name in self._known}

    @property
    def chunk_nbytes(self) -> int:
        """The chunk size that the first source wants."""
        first = next(name for name in self.sources if name in self._known)
        return self._known[first].described.chunk_nbytes

    @property
    def version(self) -> int:
        """The highest version that some source knows to have been taken, when it was described."""
        return max((origin.described.version for origin in self._known.values()), default=0)

    def describe(self, deadline: float, *, until: float = 0.0) -> dict[str, RaynixlError]:
        """Ask sources that are new or restarted what they hold; return those that do not answer, and why.

        Until the monotonic time `until`, sources that were never heard of are asked again: they may be just starting.
        """
        fresh = [name for name in self.sources if not self._is_known(name)]
        new = [name for name in fresh if name not in self._known]
        gone = [name for name in fresh if name in self._known]
        answers = ask_all(self._agent, self._topic("describe"), dict.fromkeys(gone, b""), deadline)
        answers |= ask_all(self._agent, self._topic("describe"), dict.fromkeys(new, b""), deadline, until=until)
        found, failed = self._parsed(answers, Described.from_bytes)
        failed |= self._fetch_tables(found, deadline)
        for name, described in found.items():
            if name in failed:
                continue
            try:
                shards = Shards.at(self._tables[described.table], described.rank)
            except IntegrityError as exc:
                failed[name] = exc
                continue
            sizes = pack(shards.table.entry_nbytes(shards.rank), shards.table.locals.tied)[1].tolist()
            self._known[name] = _Origin(self._incarnation(name), described, shards, sizes)
        self._forget_tables()
        return failed

    def tell(self, plan: Plan, chunk_nbytes: int, deadline: float) -> dict[str, RaynixlError]:
        """Tell sources what they serve under a plan of `planned`, where they were not told yet; return who failed."""
        key = plan.key(chunk_nbytes)
        fresh = {n: name for n, name in enumerate(self.planned) if key not in self._known[name].told}
        fresh = {n: name for n, name in fresh.items() if self._is_known(name)}
        if not fresh:
            return {}
        messages: dict[int, bytes] = {}
        for part in {plan.part_of[number] for number in fresh}:
            messages[part] = Outgoing(key, chunk_nbytes, self._served(plan, part)).to_bytes()
        payloads = {name: messages[plan.part_of[number]] for number, name in fresh.items()}
        told, failed = self._parsed(ask_all(self._agent, self._topic("outgoing"), payloads, deadline), bytes)
        for name in told:
            self._known[name].told.add(key)
        return failed

    def freeze(self, request: Freeze, plan: Plan, chunk_nbytes: int, deadline: float) -> Assembled:
        """Have the sources copy their weights out, and put together what they say of the version.

        Raises:
            IntegrityError: replicas of a part hold different weights.
            RaynixlError: no source of some part took part: the error of one.
        """
        names = list(self.planned)
        frozen: dict[str, Frozen] = {}
        failed = {name: self._gone(name) for name in names if not self._is_known(name)}
        for _ in range(2):  # a source that has forgotten the plan is told again
            failed |= self.tell(plan, chunk_nbytes, deadline)
            asked = [name for name in names if name not in frozen and name not in failed]
            answers = self._ask_freeze(dict.fromkeys(asked, request.to_bytes()), plan, deadline)
            found, refused = self._parsed(answers, Frozen.from_bytes)
            for name, one in found.items():
                if self._fits(name, request, one):
                    frozen[name] = one
                else:
                    wrong = f"{name!r} froze something else than it was asked to"
                    failed[name] = IntegrityError(wrong, hint="push again", peer=name)
            forgetful = [
                name for name, error in refused.items() if isinstance(error, PeerRestarted) and self._is_known(name)
            ]
            self._again(forgetful, deadline)
            failed |= {name: error for name, error in refused.items() if name not in forgetful}
            if not forgetful or time.monotonic() >= deadline:
                break
        failed |= {name: self._gone(name) for name in names if name not in frozen and name not in failed}
        ordered = {name: frozen[name] for name in names if name in frozen}
        return assemble(plan, (request, chunk_nbytes), (names, ordered, failed))

    def _ask_freeze(self, payloads: Mapping[str, bytes], plan: Plan, deadline: float) -> Answers:
        """Ask sources to freeze; one that is stopped is waited for no longer than for others if it has a replica."""
        numbers = {name: number for number, name in enumerate(self.planned)}

        def has_other(name: str, well: set[str]) -> bool:
            return any(plan.part_of[numbers[one]] == plan.part_of[numbers[name]] for one in well)

        return ask_running(self._agent, self._topic("freeze"), payloads, deadline, has_other=has_other)

    def release(self, push: str, *, committed: bool) -> None:
        """Tell the sources that they need not keep a push; one that does not hear it frees itself in time."""
        request = Release(push=push, committed=committed).to_bytes()
        payloads = {name: request for name in self.sources if self._incarnation(name)}
        ask_all(self._agent, self._topic("release"), payloads, time.monotonic() + _RELEASE_SECONDS)

    def gone(self, names: Iterable[str], deadline: float) -> dict[str, RaynixlError]:
        """Return which of these sources do not answer any more, and why."""
        answers = ask_all(self._agent, self._topic("status"), dict.fromkeys(names, b""), deadline)
        return self._parsed(answers, bytes)[1]

    def _again(self, names: Iterable[str], deadline: float) -> None:
        """Ask sources that have forgotten what they were told: they may have been published anew, in another way.

        Raises:
            ShardsChanged: one holds other shards now.
        """
        before = {name: self._known.pop(name).shards.digest for name in names}
        if before:
            self.describe(deadline)
        changed = [name for name, digest in before.items() if name in self._known and self._of(name) != digest]
        if changed:
            raise ShardsChanged(f"{', '.join(changed)} were published anew with other shards", hint="push again")

    def _of(self, name: str) -> str:
        return self._known[name].shards.digest

    # What these share

    def _topic(self, phase: str) -> str:
        return topic(self.name, phase)

    def _incarnation(self, name: str) -> str:
        return incarnation_of(self._agent, name)

    def _is_known(self, name: str) -> bool:
        origin = self._known.get(name)
        return origin is not None and origin.incarnation == self._incarnation(name)

    def _fits(self, name: str, request: Freeze, frozen: Frozen) -> bool:
        """Whether an answer is to what was asked, with the memory that the plan reads from."""
        origin, sizes = self._known[name], [region.nbytes for region in frozen.holder.regions]
        holder = frozen.holder
        said = (frozen.version, frozen.plan, frozen.shards, holder.name, holder.incarnation, sizes)
        life = origin.incarnation
        return said == (request.version, request.plan, origin.shards.digest, name, life, origin.arenas)

    def _gone(self, name: str) -> RaynixlError:
        lost = self._agent.lost(name)
        return PeerLost(f"source {name!r} is gone", hint="restart it", peer=name) if lost is None else lost

    def _fetch_tables(self, found: Mapping[str, Described], deadline: float) -> Errors:
        wanted = {name: one.table for name, one in found.items()}
        where = self._topic("layout")
        return fetch_tables(
            self._tables, wanted, lambda asked: self._explained_all(ask_all(self._agent, where, asked, deadline))
        )

    def _forget_tables(self) -> None:
        used = {origin.described.table for origin in self._known.values()}
        self._tables = {digest: table for digest, table in self._tables.items() if digest in used}

    def _served(self, plan: Plan, part: int) -> tuple[ImageRows, ...]:
        """Return what a part serves; worked out for all parts of a plan at once, an image at a time."""
        if (plan.digest, part) not in self._rows:
            rows: dict[int, list[ImageRows]] = {number: [] for number in range(len(plan.parts))}
            for image, layout in enumerate(plan.images):
                ranges = plan.incoming(image)
                for place, own in enumerate(ranges.parts):
                    mine = ranges[ranges.part == own].to_bytes()
                    rows[own].append(ImageRows(image, place, layout.arenas, mine))
            self._rows = {(plan.digest, number): tuple(own) for number, own in rows.items()}
        return self._rows[plan.digest, part]

    def _parsed(self, answers: Answers, parse: Callable[[bytes], T]) -> tuple[dict[str, T], Errors]:
        return parsed(self._explained_all(answers), parse)

    def _explained_all(self, answers: Answers) -> Answers:
        return {
            name: self._explained(name, answer) if isinstance(answer, RaynixlError) else answer
            for name, answer in answers.items()
        }

    def _explained(self, name: str, error: RaynixlError) -> RaynixlError:
        """Say in the words of weight sync that a source does not take part."""
        if not isinstance(error, RegionUnknown):
            return error
        return RegionUnknown(
            f"{name!r} does not publish the weights {self.name!r}",
            hint=f"call rx.publish({self.name!r}, module) there, and keep what it returns open", peer=name,
        )  # fmt: skip
