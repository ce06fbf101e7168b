"""Sections: makes each root forward of a module a read section, by hooks that survive exceptions and copies."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raynixl.weights.versionlock import VersionLock


def guard_forward(model: Any, lock: VersionLock, *, timeout: float) -> Callable[[], None]:
    """Hook a module so that its forward pins the version; return what unhooks it. Other models need no hooks."""
    import torch

    if not isinstance(model, torch.nn.Module):
        return _do_nothing
    section = _Section(lock, timeout)
    handles = [
        model.register_forward_pre_hook(_Hook(section.enter), prepend=True),
        model.register_forward_hook(_Hook(section.leave), always_call=True),
    ]

    def unhook() -> None:
        for handle in handles:
            handle.remove()

    return unhook


class _Section:
    """The pins of one module's forwards, counted for each thread."""

    def __init__(self, lock: VersionLock, timeout: float) -> None:
        self._lock = lock
        self._timeout = timeout
        self._local = threading.local()

    def enter(self) -> None:
        frame = sys._getframe(2)  # the caller of the hook: torch's frame around this forward
        self._lock.pin(self._timeout, frame=frame)
        self._local.depth = getattr(self._local, "depth", 0) + 1

    def leave(self) -> None:
        depth = getattr(self._local, "depth", 0)
        if depth == 0:  # entering failed, and torch calls the hook that always runs
            return
        self._local.depth = depth - 1
        self._lock.unpin(threading.current_thread())


class _Hook:
    """A hook that a copied or pickled module leaves behind: the copy follows no pushes."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def __call__(self, *_arguments: Any) -> None:
        self._action()

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return (_no_hook, ())


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_arguments: Any) -> None:
    return None
