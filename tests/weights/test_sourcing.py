"""Messages between whoever pushes and a source: they come back as they were, and nonsense is refused."""

import numpy as np
import pytest

from raynixl.errors import IntegrityError
from raynixl.weights.protocol import Holder
from raynixl.weights.sourcing import DeltaOffer, Frozen, ImageRows, Outgoing, Partial

pytestmark = pytest.mark.pure

SHARDS = "c" * 32 + ":3"
OUTGOING = Outgoing(
    plan="a" * 32, chunk_nbytes=4096, rows=(ImageRows(3, 1, (4096, 64), b"ranges"), ImageRows(0, 0, (), b""))
)


def digests(count):
    return np.arange(2 * count, dtype=np.uint64).reshape(count, 2) + np.uint64(1 << 63)


FROZEN = Frozen(
    version=7, plan="b" * 32, shards=SHARDS, holder=Holder(name="t", incarnation="d" * 32, regions=()), nbytes=5,
    copy_out_seconds=0.5, digest_seconds=0.25,
    partials={4: Partial(np.array([1, 5, 9], np.uint32), digests(3)), 2: Partial(np.zeros(0, np.uint32), digests(0))},
    deltas={4: DeltaOffer(base=6, offset=64, nbytes=100, digests=digests(2))},
)  # fmt: skip


def test_outgoing_rows_come_back_as_they_were():
    assert Outgoing.from_bytes(OUTGOING.to_bytes()) == OUTGOING


def test_a_frozen_version_comes_back_as_it_was():
    back = Frozen.from_bytes(FROZEN.to_bytes())
    assert (back.version, back.plan, back.shards, back.holder) == (7, "b" * 32, SHARDS, FROZEN.holder)
    assert list(back.partials) == [4, 2]
    for image, partial in FROZEN.partials.items():
        assert np.array_equal(back.partials[image].chunks, partial.chunks)
        assert np.array_equal(back.partials[image].digests, partial.digests)
    offer = back.deltas[4]
    assert (offer.base, offer.offset, offer.nbytes) == (6, 64, 100)
    assert np.array_equal(offer.digests, digests(2))


@pytest.mark.parametrize(("kind", "message"), [(Outgoing, OUTGOING), (Frozen, FROZEN)])
def test_what_is_cut_lengthened_or_foreign_is_refused(kind, message):
    data = message.to_bytes()
    for wrong in (b"", data[:5], data[:-1], data + b"x", b"RXS2" + data[4:], data[:8] + b"{}", b"RXS1\xff\xff\xff\xff"):
        with pytest.raises(IntegrityError):
            kind.from_bytes(wrong)


def test_chunks_out_of_order_and_images_twice_are_refused():
    wrong = Frozen(**{**_fields(FROZEN), "partials": {1: Partial(np.array([5, 5], np.uint32), digests(2))}})
    with pytest.raises(IntegrityError, match="order"):
        Frozen.from_bytes(wrong.to_bytes())
    twice = Outgoing("a" * 32, 4096, (OUTGOING.rows[0], OUTGOING.rows[0]))
    with pytest.raises(IntegrityError, match="twice"):
        Outgoing.from_bytes(twice.to_bytes())


def _fields(frozen):
    return {name: getattr(frozen, name) for name in Frozen.__dataclass_fields__}
