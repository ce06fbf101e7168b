"""What receivers in a relay and whoever pushes say to each other: it arrives whole, and nonsense is refused."""

import random

import pytest

from raynixl.errors import IntegrityError, PeerLost
from raynixl.record import RegionRecord
from raynixl.weights.assignment import ORIGIN, Why
from raynixl.weights.protocol import Fault, Holder
from raynixl.weights.relaying import Batch, Failed, Next

pytestmark = pytest.mark.pure

REGION = RegionRecord(id=1, generation=1, kind="dram", nbytes=4096)
HOLDER = Holder(name="rollout é", incarnation="0" * 32, regions=(REGION,))
SAID = [
    Next([]),
    Next([3, 1, 4_000_000], [], 4),
    Next([], [Failed(7, ORIGIN, Why.CORRUPT)], 0, HOLDER, is_delta=True),
    Next([1], [Failed(7, "a", Why.LOST), Failed(8, "é b", Why.STALE), Failed(9, "", Why.STALLED)], 4096, HOLDER),
]
TOLD = [
    Batch([]),
    Batch([(5, ORIGIN)]),
    Batch([(1, "a"), (2, ""), (1 << 21, "é b")], (HOLDER,)),
    Batch([], (), Fault.of(PeerLost("gone", peer="x"))),
]


@pytest.mark.parametrize("said", [*SAID, *TOLD])
def test_messages_arrive_as_they_were_sent(said):
    there = type(said).from_bytes(said.to_bytes())
    assert there.to_bytes() == said.to_bytes()
    assert list(getattr(there, "done", getattr(there, "chunks", ()))) == list(
        getattr(said, "done", getattr(said, "chunks", ()))
    )
    for name in type(said).__dataclass_fields__:
        was, now = getattr(said, name), getattr(there, name)
        assert (list(now) == list(was)) if isinstance(was, list | tuple) else now == was


@pytest.mark.parametrize("said", [*SAID, *TOLD])
def test_messages_that_were_cut_or_changed_are_refused_or_make_sense(said):
    whole, dice = said.to_bytes(), random.Random(1)
    for length in range(len(whole)):
        with pytest.raises(IntegrityError):
            type(said).from_bytes(whole[:length])
    with pytest.raises(IntegrityError):
        type(said).from_bytes(whole + b"\0")
    for _ in range(300):
        odd = bytearray(whole)
        odd[dice.randrange(len(odd))] ^= 1 << dice.randrange(8)
        try:
            there = type(said).from_bytes(bytes(odd))
        except IntegrityError:
            continue
        assert isinstance(there, type(said))
