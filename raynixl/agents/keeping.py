"""Keeping: holds on to memory that a stuck process may still write, until that process has ended."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Sequence

from raynixl.memory import Memory

_LOOK_SECONDS = 3600.0
_KEPT: list[Memory] = []
"""Memory under transfers that hardware does not end: given back, it would be written in other hands."""


def keep_for_good(memory: Memory) -> None:
    """Hold on to memory for as long as this process lives."""
    _KEPT.append(memory)


def keep_until_ended(memories: Sequence[Memory], pid: int) -> None:
    """Hold on to memory for as long as a process lives; returns at once."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    threading.Thread(target=_keep, args=(memories, pidfd), name="raynixl-keep", daemon=True).start()


def _keep(memories: Sequence[Memory], pidfd: int) -> None:
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    while not ended.poll(_LOOK_SECONDS * 1e3):
        continue
    os.close(pidfd)
    del memories
