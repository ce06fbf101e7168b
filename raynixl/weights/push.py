"""A push at work: describe, plan, freeze, pull, flip, release; each a question to all ranks at once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from raynixl.errors import ConfigError, IntegrityError, PeerLost, PeerRestarted, RaynixlError
from raynixl.weights.assembly import told_delta
from raynixl.weights.assignment import Topology
from raynixl.weights.conversation import ask_each
from raynixl.weights.digest import version_digest
from raynixl.weights.exchange import Exchange
from raynixl.weights.flips import Flips
from raynixl.weights.origins import ShardsChanged
from raynixl.weights.plan import plan
from raynixl.weights.protocol import topic
from raynixl.weights.sourcing import Freeze
from raynixl.weights.swarm import Swarm
from raynixl.weights.targeting import Blob, Describe, Pull

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.weights.origins import Origins
    from raynixl.weights.report import PushReport
    from raynixl.weights.rounds import Round
    from raynixl.weights.shards import Shards
    from raynixl.weights.targets import Targets

logger = logging.getLogger(__name__)
_GRACE_SECONDS = 10.0  # how long a rank that was never heard of may take to start
_FREEZE_SHARE = 0.3  # of the time, where a source that is frozen has a replica
_MATCH_SHARE, _PULL_SHARE = 0.4, 0.8  # of the time left then; the rest is for the flip of those that are ready
_STATUS_SHARE = 0.3  # of the time left, for sources to say that they are there
_TICK_SECONDS = 0.5

planned = lru_cache(8)(plan)
"""Plans that were made: the same ranks push again and again."""


class Push:
    """One push of one version. `run` it once."""

    def __init__(
        self, agent: Agent, name: str, now: Round, ranks: tuple[Origins, Targets], *, topology: Topology, base: int,
        exclude_failed: bool, max_lag: int | None,
    ) -> None:  # fmt: skip
        self._agent = agent
        self._name = name
        self._now = now
        self._origins, self._targets = ranks
        self._topology = topology
        self._base = base
        self._exclude_failed = exclude_failed
        self._max_lag = max_lag
        self._releasing = threading.Lock()  # held while the sources are told; protects _is_over
        self._is_over = False

    def run(self) -> PushReport:
        """Bring the version to all targets that can take it.

        Raises:
            RaynixlError: see `WeightSync.push`.
        """
        now = self._now
        try:
            self._describe()
            if not self._live():
                return self._in_vain()
            self._plan()
            self._freeze()
            self._pull()
            self._flip()
        finally:
            with self._releasing:
                self._is_over = True
                self._origins.release(now.push, committed=bool(now.flipped))
        first = next((now.image_of[name] for name in now.flipped), 0)
        digest = version_digest(now.froze.digests[first]) if now.froze.digests else ""
        return now.report(digest, len(self._targets.names))

    # Phases

    def _describe(self) -> None:
        """Ask ranks that are new what they hold and need."""
        now = self._now
        until = min(now.began + _GRACE_SECONDS, now.deadline(_FREEZE_SHARE / 2))
        alone = len(self._origins.sources) == 1
        failed = self._origins.describe(now.deadline(_MATCH_SHARE if alone else _FREEZE_SHARE), until=until)
        now.excluded.update(failed)
        if not self._origins.planned:
            raise next(iter(failed.values()))
        first, shards = next(
            ((name, own) for name, own in self._origins.planned.items() if name not in failed),
            next(iter(self._origins.planned.items())),
        )
        request = Describe(source=first, table=shards.table.digest, seconds=now.left(_MATCH_SHARE))
        until = min(now.began + _GRACE_SECONDS, now.deadline(_MATCH_SHARE / 2))
        for name, error in self._targets.describe(
            self._targets.names, request, now.deadline(_MATCH_SHARE), until=until
        ).items():
            if isinstance(error, ConfigError):
                raise error
            self._exclude(name, error)
        for name in self._live():
            version = self._targets[name].version
            if version >= now.version:
                stale = f"{name!r} serves version {version} of {self._name!r}, {now.version} is not above it"
                self._exclude(name, ConfigError(stale, hint="versions go up", peer=name))

    def _in_vain(self) -> PushReport:
        """Report that no target takes part, unless the sources would not have either.

        Raises:
            ConfigError: the version was pushed already.
        """
        now = self._now
        self._origins.forget()
        failed = self._origins.describe(now.deadline(_FREEZE_SHARE))
        if now.version <= self._origins.version:
            raise ConfigError(
                f"version {now.version} of {self._name!r} is not above {self._origins.version}, which was pushed",
                hint="versions go up",
            )
        now.excluded.update(failed)
        now.seconds = time.monotonic() - now.began
        logger.warning("version %d of %r reached nobody: %s", now.version, self._name, now.excluded)
        return now.report("", len(self._targets.names))

    def _plan(self) -> None:
        """Decide who pulls what from whom, and tell the targets; sources are told when they freeze."""
        now = self._now
        sources: Sequence[Shards] = tuple(self._origins.planned.values())
        names = self._live()
        try:
            now.plan = planned(tuple(sources), tuple(self._targets[name].shards for name in names))
        except ConfigError as exc:
            raise self._misfit(tuple(sources), names, exc) from exc
        now.image_of = dict(zip(names, now.plan.image_of, strict=True))
        told = self._targets.tell(now.plan, now.image_of, self._origins.chunk_nbytes, now.deadline(_MATCH_SHARE))
        for name, error in told.items():
            self._exclude(name, error)

    def _misfit(self, sources: tuple[Shards, ...], names: Sequence[str], error: ConfigError) -> ConfigError:
        """Say at which target tensors differ from the sources'."""
        for name in names:
            try:
                planned(sources, (self._targets[name].shards,))
            except ConfigError as exc:
                return ConfigError(f"{name!r}: {exc.message}", hint=exc.hint, peer=name)
        return error

    def _freeze(self) -> None:
        """Have the sources copy their weights out."""
        now = self._now
        alone = len(self._origins.sources) == 1
        request = Freeze(
            push=now.push, version=now.version, seconds=now.left(), plan=now.planned.digest, base=self._usable_base()
        )
        deadline = now.deadline(1.0 if alone else _FREEZE_SHARE)
        try:
            now.assembled = self._origins.freeze(request, now.planned, self._origins.chunk_nbytes, deadline)
        except ShardsChanged:
            self._origins.release(now.push, committed=False)
            self._plan()
            now.replans += 1
            request = request.model_copy(update={"plan": now.planned.digest})
            now.assembled = self._origins.freeze(request, now.planned, self._origins.chunk_nbytes, deadline)
        now.excluded.update(now.assembled.failed)

    def _usable_base(self) -> int:
        """Return the version that a delta may start from, if some target serves it."""
        return self._base if any(self._targets[name].version == self._base for name in self._live()) else 0

    def _pull(self) -> None:
        """Have all targets that are left pull and verify."""
        now = self._now
        seconds, deadline = now.left(_PULL_SHARE), now.deadline(_PULL_SHARE)
        exchange = Exchange(self._agent, self._name, now.push, on_released=self._release_early)
        try:
            payloads: dict[str, bytes] = {}
            for image in sorted(set(now.image_of.values())):
                payloads |= self._pulls(image, exchange, seconds)
            answers = self._ask_pulls(payloads, deadline, exchange)
            now.liars = exchange.liars
        finally:
            exchange.close()
        now.pulled, failed = self._targets.answers(answers)
        if not now.released:
            now.released = time.monotonic() - now.began
        self._targets.forget(name for name, error in failed.items() if isinstance(error, PeerRestarted))
        for name, error in failed.items():
            self._exclude(name, error)
        self._leave_out_liars()
        self._check_sources()
        self._note_sources()

    def _pulls(self, image: int, exchange: Exchange, seconds: float) -> dict[str, bytes]:
        """Return what the targets of one image are told to pull; those that relay take part in the exchange."""
        now, froze = self._now, self._now.froze
        names = [name for name in self._live() if now.image_of[name] == image]
        blobs, blob_digests = told_delta(froze.deltas.get(image, ()))
        with_delta = {name for name in names if blobs and self._targets[name].version == froze.base}
        now.deltas += len(with_delta)
        others = [name for name in names if name not in with_delta]
        chunks = len(froze.digests[image])
        hosts = {name: self._targets[name].host for name in others}
        is_relay = self._relays(Swarm(chunks, origin_hosts=self._hosts(), topology=self._topology), hosts)
        origins = {part: froze.holders[part] for part in now.planned.incoming(image).parts}
        exchange.expect(with_delta if is_relay else names)  # what a delta leaves wrong comes whole from the sources
        if is_relay:
            parts = [[holder.name for holder in holders] for holders in origins.values()]
            exchange.add(Swarm(chunks, origin_hosts=self._hosts(), topology=Topology.RELAY), hosts, parts)
        pull = Pull(
            push=now.push, version=now.version, plan=now.planned.digest, seconds=seconds, flip_seconds=now.left(),
            is_relay=is_relay, origins=origins, digests=froze.digests[image],
        )  # fmt: skip
        full = pull.to_bytes() if others else b""
        delta = b""
        if with_delta:
            relays = self._relay_delta(with_delta, blobs, len(blob_digests), exchange)
            pull = replace(pull, is_relay=relays, base=froze.base, blobs=blobs, blob_digests=blob_digests)
            delta = pull.to_bytes()
        return {name: delta if name in with_delta else full for name in names}

    def _relay_delta(self, names: Iterable[str], blobs: Sequence[Blob], chunks: int, exchange: Exchange) -> bool:
        """Have those who get a delta feed each other with it, if they are to; return whether."""
        hosts = {name: self._targets[name].host for name in names}
        is_relay = self._relays(Swarm(chunks, origin_hosts=self._hosts(), topology=self._topology), hosts)
        if is_relay:
            parts = [[one.owner for one in blob.at] for blob in blobs]
            exchange.add(Swarm(chunks, origin_hosts=self._hosts(), topology=Topology.RELAY), hosts, parts)
        return is_relay

    def _relays(self, swarm: Swarm, hosts: Mapping[str, str]) -> bool:
        """Whether receivers feed each other."""
        for name, host in hosts.items():
            swarm.join(name, host)
        return len(hosts) > 1 and not swarm.is_direct

    def _hosts(self) -> list[str]:
        """Return the hosts of the sources, as far as they are known."""
        hosts = []
        for name in self._origins.planned:
            connection = self._agent.connector.current(name)
            record = None if connection is None else connection.record
            hosts.append(f"host of {name}" if record is None else record.host)
        return hosts

    def _ask_pulls(
        self, payloads: Mapping[str, bytes], deadline: float, exchange: Exchange
    ) -> dict[str, bytes | RaynixlError]:
        """Ask targets to pull, and look after those that feed each other until all have answered."""
        answers: dict[str, bytes | RaynixlError] = {}
        ticked = time.monotonic()
        for found in ask_each(self._agent, topic(self._name, "pull"), payloads, deadline, every=_TICK_SECONDS):
            answers |= {name: self._targets.explained(name, answer) for name, answer in found.items()}
            _, failed = self._targets.answers(found)
            if found:
                exchange.over(found, failed)
            if time.monotonic() - ticked > _TICK_SECONDS:
                ticked = time.monotonic()
                exchange.tick()
        return answers

    def _release_early(self) -> None:
        """Tell the sources that others hold all they have to give."""
        self._now.released = time.monotonic() - self._now.began
        with self._releasing:
            if not self._is_over:
                self._origins.release(self._now.push, committed=False)

    def _check_sources(self) -> None:
        """If pulls failed because every source of some part is gone, the push has failed: nobody flips."""
        now = self._now
        names = list(self._origins.planned)
        excluded = [error for name, error in now.excluded.items() if name in self._targets.names]
        suspects = set(names) if not now.pulled else {error.peer for error in excluded if error.peer in names}
        gone = self._origins.gone(suspects, now.deadline(_STATUS_SHARE)) if suspects and excluded else {}
        for members in now.planned.parts:
            if gone and all(names[member] in gone for member in members):
                raise gone[names[members[0]]]
        if gone:
            now.replans += len(gone)

    def _note_sources(self) -> None:
        """Report sources that did not give what they should, and for which their replicas stood in."""
        now = self._now
        errors = [fault.error() for answer in now.pulled.values() for fault in answer.around]
        errors.sort(key=lambda error: isinstance(error, IntegrityError))  # that it lied outweighs that it was slow
        known = {error.peer: error for error in errors if error.peer in self._origins.planned}
        now.liars += tuple(sorted(name for name, error in known.items() if isinstance(error, IntegrityError)))
        now.replans += len(known)
        now.excluded.update((name, error) for name, error in known.items() if name not in self._targets.names)

    def _flip(self) -> None:
        """Have all replicas that are ready serve the new version, each with all of its ranks or not at all."""
        now = self._now
        self._leave_out_partial_replicas()
        self._check_lag()
        ready = [
            dict.fromkeys(replica, now.push) for replica in self._targets.replicas if set(replica) <= set(now.pulled)
        ]
        done = Flips(self._agent, self._targets, now.began + now.timeout).run(ready)
        now.flipped, failed = done.well, done.failed
        now.excluded.update(failed)
        for name in now.flipped:
            self._targets[name].version = now.version
        self._targets.forget(failed)
        now.seconds = time.monotonic() - now.began
        if not now.flipped:
            logger.warning("version %d of %r reached nobody: %s", now.version, self._name, now.excluded)
        if failed and not self._exclude_failed:
            raise next(iter(failed.values()))

    def _leave_out_liars(self) -> None:
        """Have nobody install what others found to be corrupt."""
        now = self._now
        for name in now.liars:
            if now.pulled.pop(name, None) is not None:
                wrong = f"{name!r} gave corrupt chunks of version {now.version} to others"
                self._exclude(name, IntegrityError(wrong, hint="look at its memory and its links", peer=name))

    def _leave_out_partial_replicas(self) -> None:
        now = self._now
        for replica in self._targets.replicas:
            missing = [name for name in replica if name not in now.pulled]
            for name in replica:
                if missing and name in now.pulled:
                    error = PeerLost(
                        f"{name!r} stays on its old version with {missing[0]!r} of its replica",
                        hint=f"see why {missing[0]!r} was excluded", peer=missing[0],
                    )  # fmt: skip
                    self._exclude(name, error)
                    del now.pulled[name]

    def _check_lag(self) -> None:
        """Refuse to flip if that would leave a target further behind than is allowed."""
        now = self._now
        if self._max_lag is None:
            return
        for name, error in now.excluded.items():
            if name in self._targets.names and now.version - self._targets.last_version(name) > self._max_lag:
                raise error

    # What the phases share

    def _live(self) -> list[str]:
        return [name for name in self._targets.names if name not in self._now.excluded]

    def _exclude(self, name: str, error: RaynixlError) -> None:
        self._now.excluded[name] = error
        if name in self._targets.names and not self._exclude_failed:
            raise error
