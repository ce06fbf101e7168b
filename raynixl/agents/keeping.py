"""Keeping: holds on to memory that a stuck process may still write, until that process has ended."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Sequence

from raynixl.memory import Memory
from raynixl.native import Gate

_LOOK_SECONDS = 3600.0


def keep_until_left(memory: Memory, gate: Gate) -> None:
    """Hold on to memory for as long as a transfer is inside its gate; returns at once.

    Hardware that hangs may go on: given back, the memory would be written in other hands.
    """
    threading.Thread(target=_keep_inside, args=(memory, gate), name="raynixl-keep", daemon=True).start()


def _keep_inside(memory: Memory, gate: Gate) -> None:
    while not gate.drain(_LOOK_SECONDS):
        continue
    del memory


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
