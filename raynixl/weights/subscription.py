"""Subscription: a target's weights, replaced by a pushed version all at once and never half."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from raynixl.conditions import Condition
from raynixl.errors import AgentClosed, ConfigError, TransferTimeout
from raynixl.weights.callback import FlipCallback, OnFlip
from raynixl.weights.follower import Follower, Options
from raynixl.weights.installer import Installer, Target
from raynixl.weights.protocol import check_weights_name, topic
from raynixl.weights.section import guard_forward
from raynixl.weights.throttle import Throttle

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.weights.recorder import Loader
    from raynixl.weights.selection import Select
    from raynixl.weights.shards import Shards
    from raynixl.weights.tensors import Model

_CLOSE_SECONDS = 10.0
_PIN_SECONDS = 60.0  # how much longer than flip_timeout a reader waits for a flip, on_flip included


class Subscription:
    """A model that follows what is pushed under a name. Made by `subscribe`; close it, or use it as a context manager.

    A version lands in a shadow slot while the old one is served, so that its memory is at most twice the model's.
    Tensors that a user took out of the model before a flip may be overwritten by the version after the next.
    """

    def __init__(
        self, agent: Agent, name: str, model: Model, what: Target, *, on_flip: OnFlip | None, install: str,
        options: Options,
    ) -> None:  # fmt: skip
        self.name = check_weights_name(name)
        if agent.control.serves(topic(name, "pull")):
            raise ConfigError(
                f"{agent.name!r} has subscribed to {name!r} already", hint="close that subscription first"
            )
        self._agent = agent
        self._patience = options.flip_timeout + _PIN_SECONDS
        self._installer = Installer(model, what, install, owner=agent.name)
        self._follower = Follower(
            agent, name, self._installer, callback=FlipCallback(on_flip), options=options, served=self._serve
        )
        self._changed = Condition()  # protects _version, _is_closed
        self._version = 0
        self._is_closed = False
        self._follower.prepare()
        self._unhook = guard_forward(model, self._follower.lock, timeout=self._patience)
        self._phases = self._follower.phases()
        for phase, handler in self._phases.items():
            agent.serve(topic(name, phase), handler, threaded=True)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"version {self._version}"
        return f"Subscription({self.name!r}, {state}, install={self._installer.way.value!r})"

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def version(self) -> int:
        """The version that is served, or 0 before the first."""
        return self._version

    @property
    def held_versions(self) -> list[int]:
        """The versions that lie here whole, oldest first: what `WeightSync.roll_back` can return to."""
        return self._follower.held_versions

    @contextmanager
    def pinned(self) -> Iterator[int]:
        """Read the weights inside: they are of one version, which is returned, to the end of the section.

        A module's root forward is such a section by itself. Sections nest; a flip waits for them, up to flip_timeout.

        Raises:
            TransferTimeout: a flip did not end.
        """
        thread = self._follower.lock.pin(self._patience)
        try:
            yield self._version
        finally:
            self._follower.lock.unpin(thread)

    def wait_version(self, version: int, timeout: float) -> int:
        """Wait until this version or a later one is served; return which.

        Raises:
            TransferTimeout: it did not come in time.
            AgentClosed: the subscription was closed meanwhile.
        """
        with self._changed:
            arrived = self._changed.wait_for(lambda: self._version >= version or self._is_closed, timeout)
            if self._version >= version:
                return self._version
        if arrived:
            raise AgentClosed(f"the subscription to {self.name!r} was closed", hint="subscribe again")
        raise TransferTimeout(
            f"version {version} of {self.name!r} did not come within {timeout:g} s; {self._version} is served",
            hint="see the report of the push",
        )

    def close(self) -> None:
        """Follow no more versions. The model keeps the one it has, which stays valid. Idempotent."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
        for phase in self._phases:
            self._agent.control.unserve(topic(self.name, phase))
        self._unhook()
        self._follower.close(_CLOSE_SECONDS)

    def _serve(self, version: int) -> None:
        with self._changed:
            self._version = version
            self._changed.notify_all()


def subscribe(  # noqa: PLR0913 - each of them is one thing that an engine may say
    agent: Agent,
    name: str,
    module_or_state_dict: Model,
    *,
    shards: Shards | None = None,
    record: Loader | None = None,
    select: Select | None = None,
    on_flip: OnFlip | None = None,
    install: str = "auto",
    flip_timeout: float = 10.0,
    keep: int = 1,
    max_gbps: float | None = None,
    memory: str = "auto",
) -> Subscription:
    """Let a module or state dict follow what is pushed under a name.

    What it needs of the published tensors: the whole of those of its own names (DTensors: their shards), or what
    `shards` declares, or what `record`, the engine's own `load_weights`, does with them: it runs once over tensors
    without memory. `select` (globs, or a function of the name) takes some tensors only.

    `install` is 'swap' (repoint each tensor's data: a flip costs microseconds a tensor), 'copy' (into the tensors'
    own memory) or 'auto': swap for modules in host memory, else copy, as captured CUDA graphs keep addresses.
    `on_flip(version)`, or `on_flip()`, runs after each flip, before any reader sees the new version; it may run the
    module. `flip_timeout` is how long a flip waits for readers. `keep` versions stay for `roll_back` and late joiners,
    each of which is a copy of the model in memory; with install='copy' a rank of a replica can only return to its old
    version, where another rank fails amid their flip, if `keep` is 2 or more. `memory` is where they lie: 'vram' on
    the GPU that the tensors are on, 'dram' in the host's memory, from where a flip brings them to the GPU, 'auto' on
    the GPU if it has room. Pulls are held to `max_gbps` gigabits a second.

    Takes memory for a second copy of the model at once, so that no push waits for it.

    Raises:
        ConfigError: an argument is unusable, the shards are not what the model has, or this agent has subscribed to
            the name already.
        RangeError: the host has too little memory for a second copy.
    """
    if not 0 < flip_timeout < 1e6:
        raise ConfigError(f"flip_timeout={flip_timeout!r} is not usable", hint="give a positive number of seconds")
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ConfigError(f"keep={keep!r} is not usable", hint="keep 1 version or more")
    if record is not None and shards is not None:
        raise ConfigError("a target is either declared or recorded", hint="give shards or record")
    options = Options(flip_timeout, keep, Throttle(max_gbps))
    target = Target(shards, select, record, memory)
    return Subscription(agent, name, module_or_state_dict, target, on_flip=on_flip, install=install, options=options)
