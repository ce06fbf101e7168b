"""The callback of a subscription: what a user wants done after each flip."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from raynixl.errors import ConfigError
from raynixl.weights.protocol import printable

logger = logging.getLogger(__name__)

OnFlip = Callable[[int], object] | Callable[[], object]
"""Gets the version, or nothing: engines' own methods, such as `reset_prefix_cache()`, take no argument."""

_HINT = "give a function of the version, or of nothing"
_MAX_NOTE_CHARS = 2000


class FlipCallback:
    """Calls `on_flip` with the version, or without where it takes no argument.

    Raises:
        ConfigError: it cannot be called in either way.
    """

    def __init__(self, on_flip: OnFlip | None) -> None:
        if on_flip is not None and not callable(on_flip):
            raise ConfigError(f"on_flip={on_flip!r:.80} cannot be called", hint=_HINT)
        if inspect.iscoroutinefunction(on_flip):
            raise ConfigError(f"on_flip={on_flip!r:.80} is asynchronous", hint=f"nobody would await it: {_HINT}")
        self._call: Any = on_flip
        self._arguments = 1 if on_flip is None else _count_arguments(on_flip)

    def run(self, version: int) -> str:
        """Call it; return what it raised, for the report, or ''."""
        if self._call is None:
            return ""
        try:
            self._call(*(version,)[: self._arguments])
        except Exception as exc:  # the user's code; whoever pushes gets it in the report
            logger.warning("on_flip failed", exc_info=True)
            return printable(f"on_flip raised {exc!r}")[:_MAX_NOTE_CHARS]
        return ""


def _count_arguments(call: OnFlip) -> int:
    try:
        signature = inspect.signature(call)
    except ValueError:  # a function in C that says nothing of itself
        return 1
    for arguments in ((0,), ()):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return len(arguments)
    raise ConfigError(f"on_flip={call!r:.80} needs other arguments", hint=_HINT)
