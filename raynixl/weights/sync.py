"""Weight sync: pushes versions from sources to targets in two phases, pull and flip."""

from __future__ import annotations

import asyncio
import logging
import operator
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from raynixl.errors import ConfigError, IntegrityError, RaynixlError, RegionUnknown, TransferTimeout
from raynixl.weights.conversation import ask_all
from raynixl.weights.protocol import Answer, Flip, Freeze, Frozen, Match, Pull, Release, Wire, check_weights_name, topic
from raynixl.weights.report import PushReport, RankReport

if TYPE_CHECKING:
    from raynixl.agents import Agent

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Wire)
_GRACE_SECONDS = 10.0  # how long a rank that was never heard of may take to start
_RELEASE_SECONDS = 1.0
_FREEZE_SHARE = 0.3  # of the time, where a source that is frozen has a replica
_MATCH_SHARE, _PULL_SHARE = 0.4, 0.8  # of the time left then; the rest is for the flip of those that are ready
_MAX_VERSION = 1 << 62


@dataclass(slots=True)
class _Round:
    """One push on its way."""

    version: int
    began: float
    timeout: float
    push: str = field(default_factory=lambda: secrets.token_hex(16))
    frozen: dict[str, Frozen] = field(default_factory=dict)
    pulled: dict[str, Answer] = field(default_factory=dict)
    flipped: dict[str, Answer] = field(default_factory=dict)
    excluded: dict[str, RaynixlError] = field(default_factory=dict)
    seconds: float = 0.0

    def left(self, share: float = 1.0) -> float:
        """Return a share of the time that is left."""
        return max(0.001, (self.began + self.timeout - time.monotonic()) * share)

    def deadline(self, share: float = 1.0) -> float:
        return time.monotonic() + self.left(share)

    @property
    def first(self) -> Frozen:
        return next(iter(self.frozen.values()))


class WeightSync:
    """Carries the weights that sources publish under a name to the targets that subscribe to it.

    Sources and targets are agents' names. Several sources are replicas: they must hold the same weights, and targets
    spread over them. A target that restarts takes part in the next push by itself. Any thread may push; pushes
    follow one another. With `exclude_failed` targets that die, freeze or are too slow are left on their old
    version and reported; without it the first such failure is raised, and no target flips unless that was in the
    flip itself, such as a reader that does not leave.
    """

    def __init__(
        self,
        agent: Agent,
        name: str,
        sources: Sequence[str],
        targets: Sequence[str],
        *,
        timeout: float = 60.0,
        exclude_failed: bool = True,
    ) -> None:
        self.name = check_weights_name(name)
        self.sources = _names(sources, "sources")
        self.targets = _names(targets, "targets")
        self.timeout = _check_timeout(timeout)
        self._agent = agent
        self._exclude_failed = exclude_failed
        self._pushing = threading.Lock()  # held by one push at a time; protects _version, _matched, _heard
        self._version = 0
        self._matched: dict[str, tuple[str, str]] = {}  # target -> (incarnation, layout that fits)
        self._heard: set[str] = set()

    def __repr__(self) -> str:
        return f"WeightSync({self.name!r}, {len(self.sources)} to {len(self.targets)}, version {self._version})"

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
        began = time.monotonic()
        version = _check_version(version)
        if not self._pushing.acquire(timeout=seconds):
            raise TransferTimeout(f"another push of {self.name!r} is not over after {seconds:g} s", hint="push again")
        try:
            if version <= self._version:
                raise ConfigError(
                    f"version {version} of {self.name!r} is not above {self._version}, which was pushed",
                    hint="versions go up",
                )
            return self._push(_Round(version, began, seconds))
        finally:
            self._pushing.release()

    async def push_async(self, version: int, *, timeout: float | None = None) -> PushReport:
        """Push from an event loop, which goes on meanwhile. A push whose waiter is cancelled still ends by itself."""
        return await asyncio.to_thread(self.push, version, timeout=timeout)

    def _push(self, now: _Round) -> PushReport:
        try:
            self._freeze(now)
            self._match(now)
            self._pull(now)
            self._flip(now)
        finally:
            self._release(now)
        return self._report(now)

    # Phases

    def _freeze(self, now: _Round) -> None:
        """Have the sources copy their weights out."""
        request = Freeze(push=now.push, version=now.version, seconds=now.left()).to_bytes()
        share = 1.0 if len(self.sources) == 1 else _FREEZE_SHARE
        answers = self._ask("freeze", dict.fromkeys(self.sources, request), now, share)
        for name, data in answers.items():
            frozen = _parse(Frozen, data, name)
            if isinstance(frozen, RaynixlError):
                self._exclude(now, name, frozen)
            else:
                now.frozen[name] = frozen
        if not now.frozen:
            raise next(iter(now.excluded.values()))
        self._check_replicas(now)

    def _check_replicas(self, now: _Round) -> None:
        """Refuse sources that do not hold the same bytes, cut into the same chunks."""
        first, head = now.first.manifest, now.first.holder.name
        for name, frozen in now.frozen.items():
            manifest = frozen.manifest
            if (manifest.layout, manifest.chunk_nbytes) != (first.layout, first.chunk_nbytes):
                raise ConfigError(
                    f"sources {head!r} and {name!r} publish different layouts or chunks of {self.name!r}",
                    hint="sources are replicas: publish the same model in the same way", peer=name,
                )  # fmt: skip
            if manifest.digests != first.digests:
                raise IntegrityError(
                    f"sources {head!r} and {name!r} hold different weights under {self.name!r}",
                    hint="sources are replicas: give one, or bring them into step", peer=name,
                )  # fmt: skip

    def _match(self, now: _Round) -> None:
        """Ask targets that are new whether the layout fits, before anything moves."""
        layout = now.first.manifest.layout
        fresh = [name for name in self.targets if self._matched.get(name) != (self._incarnation(name), layout)]
        source = next(iter(now.frozen))
        request = Match(layout=layout, source=source, seconds=now.left(_MATCH_SHARE)).to_bytes()
        answers = self._ask("match", dict.fromkeys(fresh, request), now, _MATCH_SHARE)
        fitting = self._answers(answers, now)
        wrong = [error for name, error in now.excluded.items() if name in fresh and isinstance(error, ConfigError)]
        if wrong:
            raise wrong[0]
        for name, answer in fitting.items():
            self._matched[name] = (self._incarnation(name), layout)
            if answer.version >= now.version:
                stale = f"{name!r} serves version {answer.version} of {self.name!r}, {now.version} is not above it"
                self._exclude(now, name, ConfigError(stale, hint="versions go up", peer=name))

    def _pull(self, now: _Round) -> None:
        """Have all targets that are left pull and verify."""
        holders = [frozen.holder for frozen in now.frozen.values()]
        manifest, seconds = now.first.manifest, now.left(_PULL_SHARE)
        names = [name for name in self.targets if name not in now.excluded]
        requests = {}
        for number, name in enumerate(names):
            turn = number % len(holders)
            preferred = (*holders[turn:], *holders[:turn])
            requests[name] = Pull(
                push=now.push, seconds=seconds, flip_seconds=now.left(), manifest=manifest, holders=preferred
            ).to_bytes()
        now.pulled = self._answers(self._ask("pull", requests, now, _PULL_SHARE), now)
        self._check_sources(now)

    def _check_sources(self, now: _Round) -> None:
        """If pulls failed because every source is gone, the push has failed: nobody flips."""
        suspects = {error.peer for error in now.excluded.values() if error.peer in now.frozen}
        if not suspects:
            return
        answers = ask_all(self._agent, topic(self.name, "status"), dict.fromkeys(suspects, b""), now.deadline())
        gone = {name: error for name, error in answers.items() if isinstance(error, RaynixlError)}
        if len(gone) == len(now.frozen):
            raise next(iter(gone.values()))

    def _flip(self, now: _Round) -> None:
        """Have all targets that are ready serve the new version."""
        request = Flip(push=now.push, seconds=now.left()).to_bytes()
        answers = self._ask("flip", dict.fromkeys(now.pulled, request), now, 1.0)
        now.flipped, failed = _sort(answers)
        now.excluded.update(failed)
        now.seconds = time.monotonic() - now.began
        if now.flipped:
            self._version = now.version
        else:
            logger.warning("version %d of %r reached nobody: %s", now.version, self.name, now.excluded)
        if failed and not self._exclude_failed:
            raise next(iter(failed.values()))

    def _release(self, now: _Round) -> None:
        """Tell the sources that the push is over; one that does not hear it frees itself at the push's deadline."""
        request = Release(push=now.push, committed=bool(now.flipped)).to_bytes()
        payloads = {name: request for name in self.sources if self._incarnation(name)}
        ask_all(self._agent, topic(self.name, "release"), payloads, time.monotonic() + _RELEASE_SECONDS)

    # What the phases share

    def _ask(
        self, phase: str, payloads: Mapping[str, bytes], now: _Round, share: float
    ) -> dict[str, bytes | RaynixlError]:
        """Ask ranks; those never heard of get time to start."""
        new = {name: payload for name, payload in payloads.items() if name not in self._heard}
        until = min(now.began + _GRACE_SECONDS, now.deadline(share / 2)) if new else 0.0
        answers = ask_all(self._agent, topic(self.name, phase), payloads, now.deadline(share), until=until)
        self._heard.update(name for name, answer in answers.items() if isinstance(answer, bytes))
        return {name: self._explain(name, phase, answer) for name, answer in answers.items()}

    def _explain(self, name: str, phase: str, answer: bytes | RaynixlError) -> bytes | RaynixlError:
        """Say in the words of weight sync that a rank does not take part."""
        if not isinstance(answer, RegionUnknown):
            return answer
        does, call = ("publish", "publish") if phase == "freeze" else ("subscribe to", "subscribe")
        return RegionUnknown(
            f"{name!r} does not {does} the weights {self.name!r}",
            hint=f"call rx.{call}({self.name!r}, module) there, and keep what it returns open", peer=name,
        )  # fmt: skip

    def _answers(self, answers: Mapping[str, bytes | RaynixlError], now: _Round) -> dict[str, Answer]:
        """Return the answers of targets that did well; exclude the others."""
        well, failed = _sort(answers)
        for name, error in failed.items():
            self._exclude(now, name, error)
        return well

    def _exclude(self, now: _Round, name: str, error: RaynixlError) -> None:
        now.excluded[name] = error
        if name in self.targets and not self._exclude_failed:
            raise error

    def _incarnation(self, name: str) -> str:
        """Return the incarnation of a rank that we are connected to, or ''."""
        connection = self._agent.connector.current(name)
        return "" if connection is None or connection.lost is not None else connection.incarnation

    def _report(self, now: _Round) -> PushReport:
        ranks = {name: _rank(now.pulled[name], answer) for name, answer in now.flipped.items()}
        return PushReport(
            version=now.version, seconds=now.seconds, nbytes=now.first.nbytes,
            gbps=now.first.nbytes * len(ranks) / now.seconds / 1e9,
            copy_out_seconds=max(frozen.copy_out_seconds for frozen in now.frozen.values()),
            digest_seconds=max(frozen.digest_seconds for frozen in now.frozen.values()),
            flip_seconds=max((rank.flip_seconds for rank in ranks.values()), default=0.0),
            digest=now.first.manifest.digest, excluded=now.excluded, ranks=ranks,
            targets=len(self.targets),
        )  # fmt: skip


def _sort(answers: Mapping[str, bytes | RaynixlError]) -> tuple[dict[str, Answer], dict[str, RaynixlError]]:
    """Return the answers of targets that did well, and why the others did not."""
    well, failed = {}, {}
    for name, data in answers.items():
        answer = _parse(Answer, data, name)
        if isinstance(answer, RaynixlError):
            failed[name] = answer
        elif answer.fault is not None:
            failed[name] = answer.fault.error()
        else:
            well[name] = answer
    return well, failed


def _check_version(version: object) -> int:
    """Return a version as an int; counters of numpy and torch are integers too."""
    is_integer = hasattr(version, "__index__") and not isinstance(version, bool)
    number = operator.index(version) if is_integer else 0  # type: ignore[arg-type]
    if not 0 < number < _MAX_VERSION:
        raise ConfigError(f"version {version!r:.80} is not a positive integer", hint="count versions from 1")
    return number


def _rank(pulled: Answer, flipped: Answer) -> RankReport:
    return RankReport(
        seconds=pulled.seconds + flipped.seconds, pull_seconds=pulled.pull_seconds,
        verify_seconds=pulled.verify_seconds, flip_seconds=flipped.seconds, nbytes=pulled.nbytes, note=flipped.note,
    )  # fmt: skip


def _parse(kind: type[M], data: bytes | RaynixlError, name: str) -> M | RaynixlError:
    if isinstance(data, RaynixlError):
        return data
    try:
        return kind.from_bytes(data)
    except IntegrityError as exc:
        return IntegrityError(f"{name!r} answered nonsense: {exc.message}", hint=exc.hint, peer=name)


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
