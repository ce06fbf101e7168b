"""Weight sync for actors: publish and subscribe in this process, push between the actors behind handles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import ray

from raynixl.actors.handles import ATTACH_TIMEOUT, START_TIMEOUT, actor_id, agent_names
from raynixl.actors.process import agent
from raynixl.config import check_timeout
from raynixl.errors import ConfigError, RaynixlError
from raynixl.weights import Publication, PushReport, Subscription
from raynixl.weights import WeightSync as NamedWeightSync
from raynixl.weights import publish as publish_by
from raynixl.weights import subscribe as subscribe_by


def publish(name: str, source: Any, **options: Any) -> Publication:
    """Publish a module's or state dict's weights under a name, by this process's agent. See `raynixl.weights`."""
    return publish_by(agent(), name, source, **options)


def subscribe(name: str, module: Any, **options: Any) -> Subscription:
    """Have a module follow the weights published under a name, by this process's agent. See `raynixl.weights`.

    `on_flip(version)`, or `on_flip()`, is called after each flip; `with subscription.pinned() as version:` holds one
    version.
    """
    return subscribe_by(agent(), name, module, **options)


class WeightSync:
    """Pushes versions of the weights under a name from sources to targets: actor handles or agents' names.

    A list among the targets is a replica, whose ranks flip together. Waits until the actors' agents are published, for
    `start_timeout` at most. See `raynixl.weights.WeightSync` for what a push promises, and for its options.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Any],
        targets: Sequence[Any],
        *,
        timeout: float = 60.0,
        start_timeout: float = START_TIMEOUT,
        **options: Any,
    ) -> None:
        sources, targets = _listed(sources, "sources"), _listed(targets, "targets")
        self._names: dict[str, str] = {}  # of the agents behind handles, by the actors' ids: dead ones do not say
        self._start_timeout = check_timeout(start_timeout, START_TIMEOUT, what="start_timeout")
        self._learn([*sources, *_ranks(targets)], timeout=self._start_timeout)
        here = [self._name(source) for source in sources]
        self._sync = NamedWeightSync(agent(), name, here, self._replicas(targets), timeout=timeout, **options)

    def __repr__(self) -> str:
        return repr(self._sync)

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of all targets' agents, the ranks of replicas one after the other."""
        return self._sync.targets

    @property
    def version(self) -> int:
        """The last version that some target took, or 0."""
        return self._sync.version

    def push(self, version: int, *, timeout: float | None = None) -> PushReport:
        """Make every target serve the sources' present weights as `version`."""
        return self._sync.push(version, timeout=timeout)

    async def push_async(self, version: int, *, timeout: float | None = None) -> PushReport:
        """Push from an event loop."""
        return await self._sync.push_async(version, timeout=timeout)

    def join(self, targets: Sequence[Any], *, timeout: float | None = None) -> dict[str, RaynixlError]:
        """Have more targets follow and catch up; return those that could not, by name."""
        self._learn(_ranks(targets), timeout=self._start_timeout if timeout is None else max(timeout, ATTACH_TIMEOUT))
        return self._sync.join(self._replicas(targets), timeout=timeout)

    def leave(self, targets: Sequence[Any], *, timeout: float | None = None) -> None:
        """Have targets, dead ones too, follow no more."""
        self._sync.leave([self._name(target) for target in _ranks(targets)], timeout=timeout)

    def roll_back(self, version: int, *, timeout: float | None = None) -> dict[str, RaynixlError]:
        """Have all targets serve a version again that they still hold; return those that could not, by name."""
        return self._sync.roll_back(version, timeout=timeout)

    def lag(self, *, timeout: float = 5.0) -> dict[str, int | RaynixlError]:
        """Return by how many versions each target is behind, by name."""
        return self._sync.lag(timeout=timeout)

    def _learn(self, workers: Sequence[Any], *, timeout: float) -> None:
        """Find the agents behind handles."""
        handles = [worker for worker in workers if not isinstance(worker, str)]
        names = agent_names(handles, timeout=timeout)
        self._names |= {actor_id(handle): name for handle, name in zip(handles, names, strict=True)}

    def _name(self, worker: Any) -> str:
        if isinstance(worker, str):
            return worker
        if not isinstance(worker, ray.actor.ActorHandle) or actor_id(worker) not in self._names:
            raise ConfigError(f"{worker!r:.80} does not follow these weights", hint="name those that were given")
        return self._names[actor_id(worker)]

    def _replicas(self, targets: Sequence[Any]) -> list[str | list[str]]:
        return [
            [self._name(rank) for rank in target] if isinstance(target, list | tuple) else self._name(target)
            for target in targets
        ]


def _listed(workers: Sequence[Any], what: str) -> list[Any]:
    if isinstance(workers, str) or not isinstance(workers, Iterable):
        raise ConfigError(f"{what} {workers!r:.80} are no list", hint="give a list of actor handles or names")
    return list(workers)


def _ranks(targets: Sequence[Any]) -> list[Any]:
    """Return the targets with the ranks of replicas one by one."""
    return [rank for target in targets for rank in (target if isinstance(target, list | tuple) else [target])]
