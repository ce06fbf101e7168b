"""The copying baselines move the same bytes as ours, whatever the layout and the number of threads."""

import os

import numpy as np
import pytest

from raynixl.bench import copies
from raynixl.bench.layout import Layout, digest, fill
from raynixl.errors import PeerLost, RaynixlError


@pytest.fixture
def team(request):
    made = copies.ThreadTeam.start(request.param)
    yield made
    made.close()


LAYOUTS = [Layout(8, 1, False), Layout(10_001, 1, False), Layout(64, 3000, False), Layout(24, 3000, True)]


def _memory(layout):
    source, target = np.empty(layout.nbytes, np.uint8), np.zeros(layout.nbytes, np.uint8)
    fill(source, 7)
    return source, target


@pytest.mark.parametrize("team", [1, 3], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memcpy_moves_every_byte(layout, team):
    source, target = _memory(layout)
    runner = copies.memcpy(layout, source, target, team)
    target[:] = 0
    assert len(runner.sample(2)) == 2
    assert digest(target) == layout.digest_moved(source)


@pytest.mark.parametrize("team", [1, 3], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_write", [False, True])
def test_process_vm_moves_every_byte(layout, team, is_write):
    source, target = _memory(layout)
    ours, theirs = (source, target) if is_write else (target, source)
    place = copies.Foreign(os.getpid(), theirs.ctypes.data)
    runner = copies.process_vm(layout, ours, place, is_write=is_write, team=team)
    target[:] = 0
    runner.sample(1)
    assert digest(target) == layout.digest_moved(source)


@pytest.mark.parametrize("team", [1], indirect=True)
def test_process_vm_says_what_went_wrong(team):
    layout, ours = Layout(64, 1, False), np.zeros(64, np.uint8)
    with pytest.raises(PeerLost, match="gone"):
        copies.process_vm(layout, ours, copies.Foreign(2**22 + 1, 4096), is_write=False, team=team).sample(1)
    with pytest.raises(RaynixlError, match="failed"):
        copies.process_vm(layout, ours, copies.Foreign(os.getpid(), 8), is_write=False, team=team).sample(1)
