"""Catching up: a target that is new or was left behind gets the version that others serve, from these alone."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raynixl.errors import ConfigError, PeerLost, RaynixlError
from raynixl.weights.assignment import Topology
from raynixl.weights.conversation import Asking
from raynixl.weights.digest import version_digest
from raynixl.weights.exchange import Exchange
from raynixl.weights.flips import Flips
from raynixl.weights.plan import Plan
from raynixl.weights.planning import images_of, planned
from raynixl.weights.protocol import topic
from raynixl.weights.ranks import Errors, parsed
from raynixl.weights.swarm import Swarm
from raynixl.weights.targeting import Describe, Held, Manifest, Pull

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.weights.origins import Origins
    from raynixl.weights.shards import Shards
    from raynixl.weights.targets import Target, Targets

_NOBODY = "0" * 32
_MANIFEST_SECONDS = 2.0  # for which one holder is asked, before the next


@dataclass(frozen=True, slots=True)
class _Group:
    """Targets that need the same image of a plan, and the others that do."""

    plan: Plan
    image: int
    names: list[str]
    others: list[str]


@dataclass(frozen=True, slots=True)
class _Work:
    """Pulls of a version under way, and who failed."""

    version: int
    push: str
    exchange: Exchange
    errors: Errors = field(default_factory=dict)


class CatchUp:
    """Brings targets to a version that peers hold."""

    def __init__(self, agent: Agent, name: str, ranks: tuple[Origins, Targets], seconds: float) -> None:
        self._agent = agent
        self._name = name
        self._origins, self._targets = ranks
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds

    def lag(self, version: int) -> dict[str, int | RaynixlError]:
        """Return how far each target is behind a version."""
        failed = self._look()
        version = max([version, *(one.version for one in self._served())])
        return {
            name: failed[name] if name in failed else max(0, version - self._targets[name].version)
            for name in self._targets.names
        }

    def run(self, replicas: Sequence[tuple[str, ...]], version: int) -> Errors:
        """Bring replicas to a version, or if that is 0 to the one that others serve; return who could not, and why."""
        failed = self._look()
        new = [name for replica in replicas for name in replica]
        version = version or max((one.version for one in self._served(but=new)), default=0)
        errors: Errors = {name: failed[name] for name in new if name in failed}
        if not version:
            return errors
        push = secrets.token_hex(16)
        behind = [name for name in new if name not in failed and not self._serves(name, version)]
        pulled, lacking = self._bring(behind, version, push)
        errors |= lacking
        return errors | self._flip(pulled, replicas, version, push)

    def roll_back(self, version: int) -> Errors:
        """Have all targets serve a version that they hold; no rank of a replica does if another does not hold it."""
        failed = self._look()
        push, errors = secrets.token_hex(16), dict(failed)
        asked: list[dict[str, str]] = []
        for replica in self._targets.replicas:
            lame = [name for name in replica if name in failed or not self._holds(name, version)]
            alone = [name for name in lame if name not in failed]  # who does not hold it says so itself
            asked += [{name: push} for name in alone] if lame else [dict.fromkeys(replica, push)]
            for name in replica:
                if lame and name not in lame:
                    why = f"{lame[0]!r} of the same replica cannot return to version {version}"
                    errors[name] = PeerLost(why, hint="see why", peer=lame[0])
        refused = Flips(self._agent, self._targets, self._deadline, version=version).run(asked).failed
        self._targets.forget(self._targets.names)
        return errors | refused

    def _holds(self, name: str, version: int) -> bool:
        return any(one.version == version for one in self._targets[name].held)

    def _served(self, but: Sequence[str] = ()) -> list[Target]:
        """Return the targets that say what they serve."""
        known = (self._targets.get(name) for name in self._targets.names if name not in but)
        return [target for target in known if target is not None]

    def _flip(self, pulled: Collection[str], replicas: Sequence[tuple[str, ...]], version: int, push: str) -> Errors:
        """Have the ranks of each replica serve what they have pulled, or none of them if one cannot."""
        ready, errors = [], {}
        for replica in replicas:
            new = [name for name in replica if name in pulled]
            lame = next((name for name in replica if name not in pulled and not self._serves(name, version)), "")
            if not lame:
                ready.append(dict.fromkeys(new, push))
                continue
            why = PeerLost(f"{lame!r} of the same replica could not catch up", hint="see why", peer=lame)
            errors.update(dict.fromkeys(new, why))
        done = Flips(self._agent, self._targets, self._deadline).run([one for one in ready if one])
        for name in done.well:
            self._targets[name].version = version
        return errors | done.failed

    def _serves(self, name: str, version: int) -> bool:
        known = self._targets.get(name)
        return known is not None and known.version == version

    def _look(self) -> Errors:
        """Ask all targets anew what they hold."""
        names = self._targets.names
        self._targets.forget(names)
        sources = self._origins.planned
        first = next(iter(sources), names[0] if names else "nobody")
        table = sources[first].table.digest if sources else _NOBODY
        request = Describe(source=first, table=table, seconds=max(0.001, self._deadline - time.monotonic()))
        until = time.monotonic() + self._seconds / 2
        return self._targets.describe(names, request, self._deadline, until=until)

    def _bring(self, names: Sequence[str], version: int, push: str) -> tuple[list[str], Errors]:
        """Have targets pull a version, those with equal needs in one swarm; return who did, and why others did not."""
        exchange = Exchange(self._agent, self._name, push, on_released=_nothing)
        work = _Work(version, push, exchange)
        pulls: dict[str, bytes] = {}
        try:
            for group in self._groups(names, work.errors):
                try:
                    pulls |= self._told(group, work)
                except RaynixlError as exc:
                    work.errors.update(dict.fromkeys(group.names, exc))
            asking = Asking(self._agent, topic(self._name, "pull"), self._deadline)
            asking.ask(pulls)
            while asking.open:
                found = asking.collect()
                _, failed = self._targets.answers(found)
                work.errors.update(failed)
                exchange.over(found, failed)
                exchange.tick()
        finally:
            exchange.close()
        return [name for name in pulls if name not in work.errors], work.errors

    def _groups(self, names: Sequence[str], errors: Errors) -> Iterator[_Group]:
        """Yield those of `names` that need the same bytes, with whoever else does; note who does not fit."""
        needs = {name: one.shards for name in self._targets.names if (one := self._targets.get(name)) is not None}
        sources = tuple(self._origins.planned.values())
        if sources:
            plans = [images_of(sources, needs)]
        else:  # nobody knows what sources hold: who says the same needs the same
            plans = [
                images_of((own,), {name: one for name, one in needs.items() if one == own}) for own in {*needs.values()}
            ]
        for made, image_of in plans:
            for image in sorted(set(image_of.values())):
                same = [name for name in image_of if image_of[name] == image]
                group = [name for name in same if name in names]
                if group:
                    yield _Group(made, image, group, [name for name in same if name not in group])
        for name in names:
            if not any(name in image_of for _, image_of in plans):
                errors[name] = _misfit(sources, needs[name])

    def _told(self, group: _Group, work: _Work) -> dict[str, bytes]:
        """Return what targets that need the same are told to pull, from those that hold it and from each other.

        Raises:
            RaynixlError: nobody holds it.
        """
        layout = group.plan.images[group.image]
        held = self._held(layout.digest, work.version, group.others)
        if not held:
            raise PeerLost(
                f"no target holds version {work.version} of {self._name!r} as {group.names[0]!r} needs it",
                hint="push the next version",
            )
        manifest = self._manifest(held, work.version, layout.digest)
        image_of = dict.fromkeys(group.names, group.image)
        chunk_nbytes = held[0][2].chunk_nbytes
        told = self._targets.tell(group.plan, image_of, chunk_nbytes, self._deadline)
        work.errors.update(told)
        names = [name for name in group.names if name not in told]
        swarm = Swarm(len(manifest.digests), origin_hosts=(), topology=Topology.RELAY)
        work.exchange.add(swarm, {name: self._targets[name].host for name in names})
        for _, host, whole in held:
            work.exchange.offer(swarm, host, whole.holder)
        left = max(0.001, self._deadline - time.monotonic())
        pull = Pull(
            push=work.push, version=work.version, plan=group.plan.key(chunk_nbytes), seconds=left, flip_seconds=left,
            is_relay=True, origins={}, digests=manifest.digests,
        ).to_bytes()  # fmt: skip
        return dict.fromkeys(names, pull)

    def _held(self, image: str, version: int, alike: Sequence[str]) -> list[tuple[str, str, Held]]:
        """Return who of those that need the same bytes holds a version of an image whole: (name, host, where)."""
        found = []
        for other in alike:
            known = self._targets[other]
            found += [(other, known.host, one) for one in known.held if (one.image, one.version) == (image, version)]
        return [one for one in found if one[2].chunk_nbytes == found[0][2].chunk_nbytes]

    def _manifest(self, held: Sequence[tuple[str, str, Held]], version: int, image: str) -> Manifest:
        """Ask holders for the digests of a version's chunks until one answers as most of them say it is."""
        named = [one.digest for _, _, one in held]
        wanted = max(set(named), key=named.count)
        failed: Errors = {}
        for name in [name for name, _, one in held if one.digest == wanted]:
            until = min(self._deadline, time.monotonic() + _MANIFEST_SECONDS)
            answers, refused = parsed(
                self._targets.ask("manifest", {name: str(version).encode()}, until), Manifest.from_bytes
            )  # fmt: skip
            failed |= refused
            for manifest in answers.values():
                is_meant = version_digest(manifest.digests) == wanted
                if is_meant and (manifest.version, manifest.image) == (version, image):
                    return manifest
        raise next(iter(failed.values()), PeerLost(f"nobody says what version {version} is", hint="push the next one"))


def _misfit(sources: tuple[Shards, ...], own: Shards) -> RaynixlError:
    """Return why a target does not fit."""
    try:
        planned(sources, (own,))
    except ConfigError as exc:
        return exc
    raise AssertionError("it fits by itself")


def _nothing() -> None:
    return None
