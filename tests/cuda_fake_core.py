"""What the parts of the fake CUDA driver share: errors, modes, and how results are handed out."""

from __future__ import annotations

import enum
from typing import Any

MISUSE = 999  # CUDA_ERROR_UNKNOWN
INVALID_VALUE = 1
POISONED = 256 << 10
"""Bytes at the beginning of fresh memory that are not zero, and of a GPU's at its end."""


class Misuse(Exception):
    """CUDA was used as it must not be, whether or not the true driver would notice."""


class Refused(Exception):
    """The driver answers with an error, as the true one would."""

    def __init__(self, code: int) -> None:
        super().__init__(f"CUDA error {code}")
        self.code = code


class Mode(enum.Enum):
    """When work that was put on a stream runs."""

    AT_ONCE = "at once"
    DELAYED = "some milliseconds later, the latest stream first"
    HELD = "when the test says so"


def put(out: int | None, kind: Any, value: Any) -> None:
    """Write a result where the caller wants it."""
    if out is None:
        raise Misuse("a result has no place to go")
    kind.from_address(out).value = value
