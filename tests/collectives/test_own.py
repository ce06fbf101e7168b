"""A member's own part, copied by a backend: how what it says becomes an error."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from raynixl import AgentClosed, BackendUnavailable, RegionStale, TransferTimeout
from raynixl.collectives.own import copy_own
from raynixl.memory import MemoryKind
from raynixl.native import CLOSED, DONE, STALE, TIMEOUT

pytestmark = pytest.mark.pure


def copy(code: int) -> None:
    """Copy between two regions of a GPU by a program that ends so."""
    source, out = (
        SimpleNamespace(kind=MemoryKind.VRAM, memory=SimpleNamespace(address=address, writable=True))
        for address in (1 << 20, 1 << 30)
    )
    backend = SimpleNamespace(copy=lambda *_: [SimpleNamespace(run=lambda _timeout: code)])
    agent: Any = SimpleNamespace(name="m0", backends=[backend])
    copy_own(agent, source, out, (0, 0, 64), 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "error"),
    [(CLOSED, AgentClosed), (STALE, RegionStale), (TIMEOUT, TransferTimeout), (-errno.EIO, BackendUnavailable)],
)
def test_each_end_is_an_error_of_its_own(code: int, error: type[Exception]) -> None:
    copy(DONE)
    with pytest.raises(error) as raised:
        copy(code)
    assert raised.value.hint  # type: ignore[attr-defined]
