"""Sections: makes each root forward of a module a read section, by hooks that survive exceptions and copies."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
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

    def enter(self, frame: FrameType) -> None:
        self._lock.pin(self._timeout, frame=frame)
        self._local.depth = getattr(self._local, "depth", 0) + 1

    def leave(self, _frame: FrameType) -> None:
        depth = getattr(self._local, "depth", 0)
        if depth == 0:  # entering failed, and torch calls the hook that always runs
            return
        self._local.depth = depth - 1
        self._lock.unpin(threading.current_thread())


class _Hook:
    """A hook that a copied or pickled module leaves behind: the copy follows no pushes.

    torch.compile leaves it alone, and all that it calls: it would warn of what it cannot trace there.
    """

    def __init__(self, action: Callable[[FrameType], None]) -> None:
        self._action = action
        self._is_disabled = False

    def __call__(self, *_arguments: Any) -> None:
        if not self._is_disabled and "torch._dynamo" in sys.modules:  # a slow import, for whoever compiles only
            import torch

            self._action, self._is_disabled = torch.compiler.disable(self._action), True  # type: ignore[no-untyped-call]
        self._action(sys._getframe(1))  # torch's frame around this forward

    __call__._torchdynamo_disable = True  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return (_no_hook, ())


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_arguments: Any) -> None:
    return None
