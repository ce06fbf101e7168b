"""The int codes of the copy engine; native/codes.h holds the same. Failures of system calls are -errno."""

from __future__ import annotations

from typing import Final

DONE: Final = 0
"""All bytes are at the destination."""
PENDING: Final = 1
"""Not ended yet."""
TIMEOUT: Final = 2
"""The deadline passed."""
CANCELLED: Final = 3
"""Ended by whoever posted it."""
CLOSED: Final = 4
"""The engine or the agent was closed."""

# With these the agent closes gates; the engine hands on any code from 2.
STALE: Final = 5
"""The region was deregistered."""
LOST: Final = 6
"""The peer is gone."""
RESET: Final = 8
"""The path to the peer was reset while the operation was in flight."""

COPY: Final = 0
"""Both ends are mapped in this process."""
VM_READ: Final = 1
"""The source is in another process."""
VM_WRITE: Final = 2
"""The destination is in another process."""
