"""Pending: an operation that goes on behind its caller's back."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Generic, TypeVar

from raynixl.errors import TransferTimeout

T = TypeVar("T")


class Pending(Generic[T]):
    """One dispatch or combine under way. Operations are carried out in the order in which they were called."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def __repr__(self) -> str:
        return f"Pending({'done' if self.done else 'under way'})"

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> T:
        """Return the result once it is there; the operation's own deadline ends it in any case.

        Raises:
            RaynixlError: as the operation does.
            TransferTimeout: it is not there within `timeout` seconds; it goes on.
        """
        try:
            return self._future.result(timeout)
        except TimeoutError as exc:
            if isinstance(exc, TransferTimeout) or self._future.done():
                raise
            raise TransferTimeout(f"the operation did not end within {timeout:g} s", hint="wait again") from exc
