"""A condition variable whose `with` no interrupt breaks."""

from __future__ import annotations

import threading
from operator import attrgetter
from typing import Any

__all__ = ["Condition"]


class Condition(threading.Condition):
    """`threading.Condition`, of which Ctrl-C never leaves the lock held.

    That of the standard library is entered and left by functions of Python, at whose beginning the interpreter looks
    at signals: an interrupt that is raised there ends the `with` with the lock held, for ever. Here the lock's own
    methods, which are C, are what `with` calls.
    """

    __enter__: Any = property(attrgetter("_own.__enter__"))
    __exit__: Any = property(attrgetter("_own.__exit__"))

    def __init__(self, lock: Any = None) -> None:
        """Use an RLock, or a new one.

        Raises:
            TypeError: it is another lock: `with` would let go of it though, after an interrupt in `wait`, it is another
                thread that holds it. An RLock refuses that.
        """
        self._own = threading.RLock() if lock is None else lock
        if not hasattr(self._own, "_is_owned"):
            raise TypeError("a condition needs an RLock")
        super().__init__(self._own)
