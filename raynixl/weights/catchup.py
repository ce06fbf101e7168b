"""Catching up: a target that is new or was left behind gets the version that others serve, from these alone."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raynixl.errors import PeerLost, RaynixlError
from raynixl.weights.assignment import Topology
from raynixl.weights.digest import version_digest
from raynixl.weights.exchange import Exchange
from raynixl.weights.flips import Flips
from raynixl.weights.plan import Plan
from raynixl.weights.push import planned
from raynixl.weights.ranks import Errors, parsed
from raynixl.weights.swarm import Swarm
from raynixl.weights.targeting import Describe, Held, Manifest, Pull

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.weights.origins import Origins
    from raynixl.weights.shards import Shards
    from raynixl.weights.targets import Target, Targets

_NOBODY = "0" * 32


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
        for replica in replicas if version else ():
            errors |= self._bring_all(replica, version, errors)
        return errors

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

    def _bring_all(self, replica: tuple[str, ...], version: int, failed: Errors) -> Errors:
        """Bring the ranks of a replica to a version: they flip together, or none does if one cannot."""
        pushes: dict[str, str] = {}
        errors: Errors = {}
        for name in replica:
            if name not in failed and self._targets[name].version != version:
                try:
                    pushes[name] = self._bring(name, version)
                except RaynixlError as exc:
                    errors[name] = exc
        lame = next((name for name in replica if name in failed or name in errors), "")
        if lame:
            why = PeerLost(f"{lame!r} of the same replica could not catch up", hint="see why", peer=lame)
            return dict.fromkeys(pushes, why) | errors
        done = Flips(self._agent, self._targets, self._deadline).run([pushes] if pushes else [])
        for name in done.well:
            self._targets[name].version = version
        return done.failed

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

    def _bring(self, name: str, version: int) -> str:
        """Have one target pull a version; return the push under which it flips.

        Raises:
            RaynixlError: nobody holds it, or it did not come.
        """
        target = self._targets[name]
        sources = tuple(self._origins.planned.values()) or (target.shards,)
        plan: Plan = planned(sources, (target.shards,))
        layout = plan.images[0]
        held = self._held(layout.digest, version, self._alike(name, sources))
        if not held:
            raise PeerLost(
                f"no target holds version {version} of {self._name!r} as {name!r} needs it",
                hint="push the next version",
            )
        manifest = self._manifest(held, version, layout.digest)
        chunk_nbytes = held[0][2].chunk_nbytes
        told = self._targets.tell(plan, {name: 0}, chunk_nbytes, self._deadline)
        if told:
            raise told[name]
        push = secrets.token_hex(16)
        exchange = Exchange(self._agent, self._name, push, on_released=_nothing)
        try:
            swarm = Swarm(len(manifest.digests), origin_hosts=(), topology=Topology.RELAY)
            for _, host, one in held:
                exchange.offer(swarm, host, one.holder)
            exchange.add(swarm, {name: target.host})
            left = max(0.001, self._deadline - time.monotonic())
            pull = Pull(
                push=push, version=version, plan=plan.digest, seconds=left, flip_seconds=left, is_relay=True,
                origins={}, digests=manifest.digests,
            ).to_bytes()  # fmt: skip
            self._require(name, "pull", pull)
        finally:
            exchange.close()
        return push

    def _alike(self, name: str, sources: tuple[Shards, ...]) -> list[str]:
        """Return the other targets that need the same bytes: ranks of one mesh are laid out alike and do not."""
        own = self._targets[name].shards
        others = {one: known.shards for one in self._targets.names if (known := self._targets.get(one)) and one != name}
        different = {shards.digest: shards for shards in others.values() if shards.digest != own.digest}
        images = planned(sources, (own, *different.values())).image_of
        same = {own.digest} | {
            digest for digest, image in zip(different, images[1:], strict=True) if image == images[0]
        }
        return [one for one, shards in others.items() if shards.digest in same]

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
        asked = {name: str(version).encode() for name, _, one in held if one.digest == wanted}
        answers, failed = parsed(self._targets.ask("manifest", asked, self._deadline), Manifest.from_bytes)
        for manifest in answers.values():
            is_meant = version_digest(manifest.digests) == wanted
            if is_meant and (manifest.version, manifest.image) == (version, image):
                return manifest
        raise next(iter(failed.values()), PeerLost(f"nobody says what version {version} is", hint="push the next one"))

    def _require(self, name: str, phase: str, payload: bytes) -> None:
        _, failed = self._targets.answers(self._targets.ask(phase, {name: payload}, self._deadline))
        if failed:
            raise failed[name]


def _nothing() -> None:
    return None
