"""A push at work: describe, plan, freeze, pull, flip, release; each a question to all ranks at once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raynixl.errors import ConfigError, IntegrityError, PeerLost, PeerRestarted, RaynixlError
from raynixl.weights.arrivals import Arrival, Arrivals
from raynixl.weights.assignment import Topology
from raynixl.weights.digest import version_digest
from raynixl.weights.exchange import Exchange
from raynixl.weights.flips import Flips
from raynixl.weights.origins import ShardsChanged
from raynixl.weights.planning import images_of, planned
from raynixl.weights.pulls import Pulls, question
from raynixl.weights.sourcing import Freeze
from raynixl.weights.targeting import Describe
from raynixl.weights.targets import Targets

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.weights.origins import Origins
    from raynixl.weights.report import PushReport
    from raynixl.weights.rounds import Round
    from raynixl.weights.shards import Shards

logger = logging.getLogger(__name__)
_GRACE_SECONDS = 10.0  # how long a rank that was never heard of may take to start
_FREEZE_SHARE = 0.3  # of the time, where a source that is frozen has a replica
_MATCH_SHARE, _PULL_SHARE = 0.4, 0.8  # of the time left then; the rest is for the flip of those that are ready
_STATUS_SHARE = 0.3  # of the time left, for sources to say that they are there


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
        self.arrivals = Arrivals()
        self._needs: dict[int, Shards] = {}
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
            self.arrivals.end()
            with self._releasing:
                self._is_over = True
                self._origins.release(now.push, committed=bool(now.flipped))
        first = next((now.image_of[name] for name in now.flipped), 0)
        digest = version_digest(now.froze.digests[first]) if now.froze.digests else ""
        return now.report(digest, len(self._targets.names))

    def admit(self, replicas: Sequence[tuple[str, ...]], deadline: float) -> list[tuple[str, ...]]:
        """Have replicas that come while this push is at work take part in it; called in another thread.

        Returns those that did, once the push is over.
        """
        if not self.arrivals.is_open(deadline):
            return []
        sources = tuple(self._origins.planned.values())
        request = question(self._origins, max(0.001, deadline - time.monotonic()))
        targets = Targets(self._agent, self._name, replicas)
        failed = targets.describe(targets.names, request, deadline, until=time.monotonic() + _GRACE_SECONDS)
        image_of = {name: self._image(sources, targets[name].shards) for name in targets.names if name not in failed}
        fitting = {name: image for name, image in image_of.items() if image is not None}
        failed = targets.tell(self._now.planned, fitting, self._now.chunk_nbytes, deadline)
        well = [replica for replica in replicas if set(replica) <= set(fitting) - set(failed)]
        targets.replicas = well
        arrival = Arrival(targets, {name: fitting[name] for name in targets.names})
        return well if well and self.arrivals.enter(arrival, deadline) else []

    def _image(self, sources: tuple[Shards, ...], own: Shards) -> int | None:
        """Return the image of this push that has what a target needs, if there is one."""
        for image, shards in self._needs.items():
            if shards.digest == own.digest:
                return image
        numbers = images_of(sources, {-1: own, **self._needs})[1]
        wanted = numbers.get(-1)  # none: it does not fit; it is told so when it is looked at by itself
        return next((image for image in self._needs if wanted is not None and numbers.get(image) == wanted), None)

    @property
    def flipped(self) -> frozenset[str]:
        """The targets that serve the version."""
        return frozenset(self._now.flipped)

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
                self._exclude(name, ConfigError(stale, hint=f"push {version + 1} or more", peer=name))

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
                hint=f"versions go up: push {self._origins.version + 1} or more",
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
        now.chunk_nbytes = self._origins.chunk_nbytes
        told = self._targets.tell(now.plan, now.image_of, now.chunk_nbytes, now.deadline(_MATCH_SHARE))
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
            push=now.push, version=now.version, seconds=now.left(), plan=now.plan_key, base=self._usable_base()
        )
        deadline = now.deadline(1.0 if alone else _FREEZE_SHARE)
        try:
            now.assembled = self._origins.freeze(request, now.planned, now.chunk_nbytes, deadline)
        except ShardsChanged:
            self._origins.release(now.push, committed=False)
            self._plan()
            now.replans += 1
            request = request.model_copy(update={"plan": now.plan_key})
            now.assembled = self._origins.freeze(request, now.planned, now.chunk_nbytes, deadline)
        now.excluded.update(now.assembled.failed)

    def _usable_base(self) -> int:
        """Return the version that a delta may start from, if some target serves it."""
        return self._base if any(self._targets[name].version == self._base for name in self._live()) else 0

    def _pull(self) -> None:
        """Have all targets that are left pull and verify, and those that come meanwhile."""
        now = self._now
        self._needs = {image: self._targets[name].shards for name, image in now.image_of.items()}
        exchange = Exchange(self._agent, self._name, now.push, on_released=self._release_early)
        try:
            ranks = (self._origins, self._targets)
            pulls = Pulls(self._agent, self._name, now, ranks, topology=self._topology, exchange=exchange)
            answers = pulls.run(self.arrivals, now.deadline(_PULL_SHARE))
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
        counting = [error for name, error in failed.items() if name not in now.late]
        if counting and not self._exclude_failed:
            raise counting[0]

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
            is_bound = name in self._targets.names and name not in now.late
            if is_bound and now.version - self._targets.last_version(name) > self._max_lag:
                raise error

    # What the phases share

    def _live(self) -> list[str]:
        return [name for name in self._targets.names if name not in self._now.excluded]

    def _exclude(self, name: str, error: RaynixlError) -> None:
        self._now.excluded[name] = error
        if name in self._targets.names and name not in self._now.late and not self._exclude_failed:
            raise error
