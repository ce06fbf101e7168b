"""Weight sync for actors: publish and subscribe in this process, push between the actors behind handles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raynixl.actors.handles import ATTACH_TIMEOUT, agent_names
from raynixl.actors.process import agent
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

    Waits until the actors' agents are published. See `raynixl.weights.WeightSync` for what a push promises.
    """

    def __init__(
        self, name: str, sources: Sequence[Any], targets: Sequence[Any], *, timeout: float = 60.0, **options: Any
    ) -> None:
        names = agent_names([*sources, *targets], timeout=max(timeout, ATTACH_TIMEOUT))
        here = len(sources)
        self._sync = NamedWeightSync(agent(), name, names[:here], names[here:], timeout=timeout, **options)

    def __repr__(self) -> str:
        return repr(self._sync)

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
