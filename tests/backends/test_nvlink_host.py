"""Host memory of peers on its way to GPUs: what may be mapped, and what is let go of."""

from __future__ import annotations

import os
from typing import Any

import pytest
from cuda_fake import FakeCuda

from raynixl.backends.nvlink_host import PeerArena
from raynixl.errors import BackendUnavailable, RangeError
from raynixl.memory import PAGE_NBYTES, allocate

pytestmark = pytest.mark.pure


class Remote:
    """What an arena asks of a peer's region."""

    label, owner = "region 'a' of 'far'", "far"

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


@pytest.mark.parametrize("is_sealed", [True, False])
def test_memory_that_could_shrink_or_is_smaller_than_said_is_not_mapped(fake_cuda: FakeCuda, is_sealed: bool) -> None:
    fd = allocate(PAGE_NBYTES).fd if is_sealed else os.memfd_create("raynixl-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE_NBYTES)
    remote: Any = Remote(PAGE_NBYTES + 1 if is_sealed else PAGE_NBYTES)
    with pytest.raises(RangeError, match="not sealed, or smaller"):
        PeerArena(fd, remote)
    os.close(fd)
    assert fake_cuda.host.ranges == []


def test_an_arena_is_seen_by_gpus_until_it_is_closed(fake_cuda: FakeCuda) -> None:
    memory, remote = allocate(2 * PAGE_NBYTES), Remote(2 * PAGE_NBYTES)
    arena = PeerArena(memory.fd, remote)  # type: ignore[arg-type]
    memory.owner[10:14] = b"here"
    assert arena.is_pinned
    assert bytes(fake_cuda.view(arena.address + 10, 4)) == b"here"
    arena.close()
    assert fake_cuda.host.ranges == []
    os.close(memory.fd)


def test_memory_that_cannot_be_mapped_is_refused(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    memory, remote = allocate(PAGE_NBYTES), Remote(PAGE_NBYTES)
    monkeypatch.setattr("raynixl.backends.nvlink_host.map_shared", fail)
    with pytest.raises(BackendUnavailable, match=r"cannot be mapped: Cannot allocate memory"):
        PeerArena(memory.fd, remote)  # type: ignore[arg-type]
    os.close(memory.fd)
