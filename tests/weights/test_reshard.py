"""Any sharding to any other: tensors that were pulled are bit-equal to slices of the full ones, no byte comes twice."""

import numpy as np
import pytest
from reshard_models import random_model, random_side
from reshard_tools import carry_out, fill, least_nbytes, locals_of, number_elements, tensors_in, values_of

from raynixl.weights.plan import Plan, plan
from raynixl.weights.shards import from_pieces
from raynixl.weights.table import pack

pytestmark = pytest.mark.pure

BATCHES, CASES = 21, 50
QUICK = 7
"""Batches that every run takes; the soak takes the others, too."""


def recorded(shards, side):
    """The same shards, said by themselves and not by their mesh."""
    return from_pieces(shards.tensors, shards.layout, shards.pieces, tied=side.tied)


def draw(rng):
    """Draw a model, sources (their sides, one or two meshes) and targets."""
    model = random_model(rng)
    is_tied = model.is_tied
    ours = [random_side(model, rng, is_tied=is_tied) for _ in range(2 if rng.random() < 0.15 else 1)]
    theirs = random_side(model, rng, is_tied=is_tied and rng.random() < 0.5)
    return model, ours, theirs


def check(seed):
    rng = np.random.default_rng(seed)
    model, ours, theirs = draw(rng)
    ids = number_elements(model.infos, model.tied)
    sources = [(shards, side) for side in ours for shards in side.shards()]
    targets = theirs.shards()
    known = [recorded(shards, side) if rng.random() < 0.1 else shards for shards, side in sources]
    wanted = [recorded(shards, theirs) if rng.random() < 0.2 else shards for shards in targets]
    made = plan(known, wanted)
    if rng.random() < 0.2:
        made = Plan.from_bytes(made.to_bytes())
    coordinates = [side.mesh.coordinates()[shards.rank] for shards, side in sources]
    arenas = [fill(shards, side, ids, at) for (shards, side), at in zip(sources, coordinates, strict=True)]
    held = [arenas[int(rng.choice(members))] for members in made.parts]
    for target, shards in enumerate(targets):
        image = made.image_of[target]
        layout, incoming = made.images[image], made.incoming(image)
        incoming.check([[len(arena) for arena in part] for part in held], layout.arenas)
        own = locals_of(theirs, ids, theirs.mesh.coordinates()[shards.rank])
        pulled = incoming
        if rng.random() < 0.5:
            chunk_nbytes = int(rng.choice([8, 64, 100, 4096]))
            pulled = check_cut(incoming.cut(layout.arenas, chunk_nbytes), layout.chunks(chunk_nbytes))
        images, counts = carry_out(pulled, held, layout.arenas)
        assert max([0, *(int(count.max(initial=0)) for count in counts)]) <= 1
        assert incoming.nbytes == made.nbytes[image] == least_nbytes(theirs, own)
        found = tensors_in(layout, images)
        assert set(found) <= set(own)
        for name, value in own.items():
            entry = shards.layout.by_name[name]
            expected = values_of(value, entry.dtype)
            if name not in found:
                assert not (value >= 0).any()
                continue
            assert np.array_equal(found[name], expected), name
    check_outgoing(made)


def check_cut(cuts, chunks):
    """Rows of a chunk lie inside it."""
    assert len(cuts) == len(chunks)
    for number, (arena, offset, nbytes) in enumerate(chunks.tolist()):
        rows = cuts[number].expand()
        assert (rows[:, 3] == arena).all()
        assert (rows[:, 4] >= offset).all()
        assert (rows[:, 4] + rows[:, 5] <= offset + nbytes).all()
        assert cuts.nbytes[number] == rows[:, 5].sum()
    return cuts.ranges


def check_outgoing(made):
    """What each part gives is what images get from it."""
    given = {}
    for part, members in enumerate(made.parts):
        for image, ranges in made.outgoing(members[-1]):
            assert ranges.parts == (part,)
            given.setdefault(image, []).append(ranges.rows)
    for image in range(len(made.images)):
        rows = np.concatenate([*given.get(image, []), np.zeros((0, 9), np.int64)])
        assert np.array_equal(rows, made.incoming(image).rows)


@pytest.mark.parametrize(
    "batch", [*range(QUICK), *(pytest.param(batch, marks=pytest.mark.slow) for batch in range(QUICK, BATCHES))]
)
def test_pulled_tensors_are_slices_of_the_full_ones_and_no_byte_is_pulled_in_vain(batch):
    for seed in range(batch * CASES, (batch + 1) * CASES):
        try:
            check(seed)
        except Exception as exc:
            raise AssertionError(f"case {seed}") from exc


def test_models_of_many_arenas_are_no_other(monkeypatch):
    monkeypatch.setitem(pack.__kwdefaults__, "arena_nbytes", 192)
    for seed in range(30):
        check(seed)
