"""Ctrl-C at every place where the interpreter looks at signals, one after another."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


def interrupts(run: Callable[[], object]) -> Iterator[str]:
    """Run something again and again, each time interrupted one place further on, until it gets through.

    Yields the place each time: where a function of Python begins, or a call of C returns. That is where CPython looks
    at signals (and where loops go round).
    """
    number = 0
    while (place := _interrupted(run, number)) is not None:
        yield place
        number += 1


def _interrupted(run: Callable[[], object], number: int) -> str | None:
    """Run it with an interrupt at the place of a number; return what place that is, None if it has none."""
    passed, place = -1, None

    def look(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal passed, place
        if event not in ("call", "c_return"):
            return
        passed += 1
        if passed == number:
            sys.setprofile(None)
            of = "" if event == "call" else f" behind {argument.__qualname__}"
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}{of}"
            raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    except KeyboardInterrupt:
        pass
    except RuntimeError as exc:  # what threading.Condition.wait makes of one while it has given its lock away
        if not isinstance(exc.__context__, KeyboardInterrupt):
            raise
    finally:
        sys.setprofile(before)
    return place
