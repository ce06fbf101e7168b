"""Sockets that forked children let go of: else a connection would outlive the process that it belongs to.

A peer hears of a process's end when the last copy of its socket is closed. A child that was forked (a data loader's
worker, say) holds copies for as long as it lives, without the threads that could answer. Closing a copy disturbs no
other.
"""

from __future__ import annotations

import os
import socket
import weakref

_SOCKETS: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_children(sock: socket.socket) -> None:
    """Have every child that this process forks from now on close its copy of a socket."""
    _SOCKETS.add(sock)


def _close_all() -> None:
    for sock in list(_SOCKETS):
        sock.close()


os.register_at_fork(after_in_child=_close_all)
