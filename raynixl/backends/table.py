"""The table of backends: ours by name, others by the entry point group `raynixl.backends`."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points

from raynixl.backends.base import Backend, Local
from raynixl.errors import BackendUnavailable, ConfigError

Factory = Callable[[Local], Backend]
ENTRY_POINTS = "raynixl.backends"

_OURS = {
    "loopback": "raynixl.backends.loopback:LoopbackBackend",
    "shm": "raynixl.backends.shm:ShmBackend",
    "nvlink": "raynixl.backends.nvlink:NvlinkBackend",
    "ucx": "raynixl.backends.ucx:UcxBackend",
}

_OFFERED: dict[str, Factory] = {}
"""Backends under test: they have no entry point, and stay here only while their agents are made."""


@contextlib.contextmanager
def offered(name: str, factory: Factory) -> Iterator[None]:
    """Let agents that are made meanwhile name a backend that is neither ours nor installed."""
    _OFFERED[name] = factory
    try:
        yield
    finally:
        _OFFERED.pop(name, None)


def names() -> list[str]:
    """Return every backend that can be named in a configuration."""
    return [*_OURS, *(point.name for point in entry_points(group=ENTRY_POINTS) if point.name not in _OURS)]


def factory(name: str) -> Factory:
    """Return the factory of a backend.

    Raises:
        ConfigError: there is none of that name.
    """
    if name in _OFFERED:
        return _OFFERED[name]
    if name in _OURS:
        module, _, attribute = _OURS[name].partition(":")
        made: Factory = getattr(importlib.import_module(module), attribute)
        return made
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            loaded: Factory = point.load()
            return loaded
    raise ConfigError(f"there is no backend {name!r}", hint=f"known are: {', '.join(names())}")


def make(local: Local) -> Iterator[Backend]:
    """Make the configured backends one by one, in order of preference: those before one that fails are known."""
    return (factory(name)(local) for name in dict.fromkeys(local.config.backends))


def named(backends: Sequence[Backend], name: str) -> Backend:
    """Return the one of that name, as a link gives it.

    Raises:
        BackendUnavailable: there is none; a backend of a third party must put its own name into its links.
    """
    for backend in backends:
        if backend.name == name:
            return backend
    raise BackendUnavailable(f"a link names the backend {name!r}", hint="a link's `backend` is its backend's `name`")
