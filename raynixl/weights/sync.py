"""Weight sync: pushes versions from sources to targets in two phases, pull and flip."""

from __future__ import annotations

import asyncio
import logging
import operator
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raynixl.errors import ConfigError, RaynixlError, TransferTimeout
from raynixl.weights.assignment import Topology
from raynixl.weights.catchup import CatchUp
from raynixl.weights.origins import Origins
from raynixl.weights.protocol import check_weights_name
from raynixl.weights.push import Push
from raynixl.weights.report import PushReport
from raynixl.weights.rounds import Round
from raynixl.weights.targets import Targets

if TYPE_CHECKING:
    from raynixl.agents import Agent

logger = logging.getLogger(__name__)

_MAX_VERSION = 1 << 62
Replica = str | Sequence[str]


class WeightSync:
    """Carries the weights that sources publish under a name to the targets that subscribe to it.

    Sources and targets are agents' names; a list among the targets is a replica, whose ranks flip together or not at
    all. Sources that publish equal shards are replicas of each other, and must hold the same weights; targets spread
    over them. A target that restarts takes part in the next push by itself. Any thread may push; pushes follow one
    another. With `exclude_failed` targets that die, freeze or are too slow are left on their old version and
    reported; without it the first such failure is raised, and no target flips unless that was in the flip itself,
    such as a reader that does not leave.

    `topology` is 'direct' (targets pull from the sources), 'relay' (they also feed each other) or 'auto'. With
    `delta="auto"` a push brings what has changed where that is little, with 'off' always everything. `max_lag`
    is how many versions a target may fall behind: a push that would leave one further behind fails instead.
    """

    def __init__(  # noqa: PLR0913 - each of them is one thing that who pushes may say
        self,
        agent: Agent,
        name: str,
        sources: Sequence[str],
        targets: Sequence[Replica],
        *,
        topology: str = "auto",
        delta: str = "auto",
        max_lag: int | None = None,
        timeout: float = 60.0,
        exclude_failed: bool = True,
    ) -> None:
        self.name = check_weights_name(name)
        self.sources = _names(sources, "sources")
        self.timeout = _check_timeout(timeout)
        self._agent = agent
        self._exclude_failed = exclude_failed
        self._topology = _check_topology(topology)
        self._delta = _check_delta(delta)
        self._max_lag = _check_lag(max_lag)
        self._origins = Origins(agent, self.name, self.sources)
        self._targets = Targets(agent, self.name, _replicas(targets))
        self._pushing = threading.Lock()  # held by one push at a time; protects all but timeout and name
        self._work: Push | None = None  # the push that is at work
        self._version = 0
        self._current = 0  # what targets are to serve: the last version, or the one that was returned to

    def __repr__(self) -> str:
        return f"WeightSync({self.name!r}, {len(self.sources)} to {len(self.targets)}, version {self._version})"

    @property
    def targets(self) -> tuple[str, ...]:
        """All targets, the ranks of replicas one after the other."""
        return self._targets.names

    @property
    def version(self) -> int:
        """The last version that some target took, or 0."""
        return self._version

    def push(self, version: int, *, timeout: float | None = None) -> PushReport:
        """Bring the sources' present weights to the targets as `version`, and make them all serve it.

        Returns when every target serves it or is excluded; the sources may change their weights after that.

        Raises:
            ConfigError: the version is not above the last, or source and target hold other tensors; with a table.
            PeerUnknown, PeerLost, TransferTimeout: the sources are gone, or another push is not over.
            IntegrityError: the sources hold different weights.
        """
        seconds = self.timeout if timeout is None else _check_timeout(timeout)
        now = Round(_check_version(version), time.monotonic(), seconds)
        with self._alone(seconds):
            if now.version <= self._version:
                raise ConfigError(
                    f"version {now.version} of {self.name!r} is not above {self._version}, which was pushed",
                    hint=f"versions go up: push {self._version + 1} or more",
                )
            work = Push(
                self._agent, self.name, now, (self._origins, self._targets), topology=self._topology,
                base=self._version if self._delta else 0, exclude_failed=self._exclude_failed, max_lag=self._max_lag,
            )  # fmt: skip
            self._work = work
            try:
                return work.run()
            finally:
                self._work = None
                if now.flipped:
                    self._version = self._current = now.version

    async def push_async(self, version: int, *, timeout: float | None = None) -> PushReport:
        """Push from an event loop, which goes on meanwhile. A push whose waiter is cancelled still ends by itself."""
        return await asyncio.to_thread(self.push, version, timeout=timeout)

    def join(self, targets: Sequence[Replica], *, timeout: float | None = None) -> dict[str, RaynixlError]:
        """Have more targets follow: they catch up from those that have the version, all of them at the same time.

        While a push is under way they take part in it, from where it is, and return when it is over.

        Returns the targets that could not catch up, with the reasons. They take part in the next push, except those
        whose tensors do not fit (ConfigError): these do not follow.

        Raises:
            ConfigError: one follows already.
            TransferTimeout: the push that is under way did not end in time.
        """
        seconds = self.timeout if timeout is None else _check_timeout(timeout)
        deadline = time.monotonic() + seconds
        new = _replicas(targets)
        self._check_new(new)
        work = self._work
        admitted = [] if work is None else work.admit(new, deadline)
        with self._alone(max(0.001, deadline - time.monotonic())):
            rest = [replica for replica in new if replica not in admitted]
            self._check_new(rest)
            self._targets.replicas += rest
            behind = [replica for replica in new if work is None or not work.flipped.issuperset(replica)]
            left = max(0.001, deadline - time.monotonic())
            ranks = (self._origins, self._targets)
            failed = CatchUp(self._agent, self.name, ranks, left).run(behind, self._current) if behind else {}
            misfits = {
                name
                for name, error in failed.items()  # what serves a version above ours fits: the next one may be above it
                if isinstance(error, ConfigError) and self._targets.last_version(name) <= self._current
            }
            self._targets.replicas = [
                replica for replica in self._targets.replicas if replica not in new or not misfits & set(replica)
            ]
            return failed

    def _check_new(self, replicas: Sequence[tuple[str, ...]]) -> None:
        taken = sorted(set(self.targets) & {name for replica in replicas for name in replica})
        if taken:
            raise ConfigError(f"{', '.join(taken)} follow already", hint="name those that are new")

    def leave(self, targets: Sequence[str], *, timeout: float | None = None) -> None:
        """Have targets follow no more; they keep the version that they serve. A replica leaves as a whole.

        Raises:
            ConfigError: one does not follow, or is only a part of a replica.
            TransferTimeout: the push that is under way did not end in time.
        """
        gone = set(_names(targets, "targets"))
        with self._alone(self.timeout if timeout is None else _check_timeout(timeout)):
            kept = [replica for replica in self._targets.replicas if not gone & set(replica)]
            dropped = {name for replica in self._targets.replicas if replica not in kept for name in replica}
            if dropped != gone:
                odd = ", ".join(sorted(dropped ^ gone))
                raise ConfigError(f"{odd}: not a follower, or a rank of a replica", hint="name whole replicas")
            self._targets.replicas = kept
            self._targets.forget(gone)

    def roll_back(self, version: int, *, timeout: float | None = None) -> dict[str, RaynixlError]:
        """Have all targets serve a version again that they still hold; return those that could not, with the reasons.

        A replica returns with all of its ranks or not at all. Targets hold as many versions as `subscribe(keep=)`
        says. The next push must still be above the last one.

        Raises:
            RaynixlError: no target could: the first reason.
            TransferTimeout: the push that is under way did not end in time.
        """
        seconds = self.timeout if timeout is None else _check_timeout(timeout)
        wanted = _check_version(version)
        with self._alone(seconds):
            failed = CatchUp(self._agent, self.name, (self._origins, self._targets), seconds).roll_back(wanted)
            if set(self.targets) <= set(failed):
                raise next(
                    (one for one in failed.values() if isinstance(one, ConfigError)), next(iter(failed.values()))
                )
            self._current = wanted
        return failed

    def lag(self, *, timeout: float = 5.0) -> dict[str, int | RaynixlError]:
        """Return by how many versions each target is behind the last that was pushed, or why it does not say.

        Raises:
            TransferTimeout: the push that is under way did not end in time.
        """
        with self._alone(timeout):
            return CatchUp(self._agent, self.name, (self._origins, self._targets), timeout).lag(self._version)

    def _alone(self, timeout: float) -> _Alone:
        return _Alone(self._pushing, self.name, timeout)


class _Alone:
    """Holds the lock of a sync, which is waited for no longer than the timeout."""

    def __init__(self, lock: threading.Lock, name: str, timeout: float) -> None:
        self._lock, self._name, self._timeout = lock, name, timeout

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=self._timeout):
            raise TransferTimeout(
                f"another push of {self._name!r} is not over after {self._timeout:g} s", hint="push again"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _check_version(version: object) -> int:
    """Return a version as an int; counters of numpy and torch are integers too."""
    is_integer = hasattr(version, "__index__") and not isinstance(version, bool)
    number = operator.index(version) if is_integer else 0  # type: ignore[arg-type]
    if not 0 < number < _MAX_VERSION:
        raise ConfigError(f"version {version!r:.80} is not a positive integer", hint="count versions from 1")
    return number


def _check_topology(topology: str) -> Topology:
    if topology not in list(Topology):
        raise ConfigError(f"topology={topology!r:.40} is not known", hint="use 'auto', 'direct' or 'relay'")
    return Topology(topology)


def _check_delta(delta: str) -> bool:
    if delta not in ("auto", "off"):
        raise ConfigError(f"delta={delta!r:.40} is not known", hint="use 'auto' or 'off'")
    return delta == "auto"


def _check_lag(max_lag: int | None) -> int | None:
    if max_lag is not None and (isinstance(max_lag, bool) or not isinstance(max_lag, int) or max_lag < 0):
        raise ConfigError(f"max_lag={max_lag!r:.40} is not usable", hint="give a number of versions, or None")
    return max_lag


def _replicas(targets: Sequence[Replica]) -> list[tuple[str, ...]]:
    if isinstance(targets, str) or not targets:
        raise ConfigError(f"targets {targets!r:.80} are not agents' names", hint="give a list of one name or more")
    replicas = [(one,) if isinstance(one, str) else _names(one, "targets") for one in targets]
    _names([name for replica in replicas for name in replica], "targets")
    return replicas


def _names(names: Sequence[str], what: str) -> tuple[str, ...]:
    if isinstance(names, str) or not names or any(not isinstance(name, str) for name in names):
        raise ConfigError(f"{what} {names!r:.80} are not agents' names", hint="give a list of one name or more")
    if len(set(names)) != len(names):
        raise ConfigError(f"{what} name an agent twice", hint="name each once")
    return tuple(names)


def _check_timeout(timeout: float) -> float:
    if not 0 < timeout < 1e6:
        raise ConfigError(f"timeout={timeout!r} is not usable", hint="give a positive number of seconds")
    return float(timeout)
