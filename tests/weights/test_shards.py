"""Shards travel unharmed or not at all, and say nothing that cannot be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reshard_models import random_model, random_side

from raynixl.errors import ConfigError, IntegrityError
from raynixl.weights.declare import Concat, Stack, declare
from raynixl.weights.layout import build_layout
from raynixl.weights.pieces import Piece, Pieces, TensorInfo
from raynixl.weights.placement import Flat, Mesh, Owner, Replicate, Shard
from raynixl.weights.shards import Shards, from_pieces, replicated
from raynixl.weights.sharing import TensorSpec
from raynixl.weights.table import ARENA_SHIFT, pack

pytestmark = pytest.mark.pure

A, B = TensorInfo("a", "float32", (4, 6)), TensorInfo("b", "float32", (4, 6))
TWO = Mesh((("tp", 2),))
WHOLE = Piece(0, (0, 0), (4, 6), 0, 0, (6, 1))


def local(*shapes):
    return build_layout([TensorSpec(f"local.{n}", "float32", shape) for n, shape in enumerate(shapes)])


def test_shards_of_random_meshes_travel_unharmed():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        for shards in random_side(random_model(rng), rng, is_tied=seed % 2 == 0).shards():
            again = Shards.from_bytes(shards.to_bytes())
            assert (again, again.digest, again.layout) == (shards, shards.digest, shards.layout)


def rows_of(shards):
    own = shards.pieces
    names = [shards.tensors[at].name for at in own.tensor.tolist()]
    columns = (own.entry, own.offset, own.start, own.size, own.stride)
    return sorted(zip(names, *(column.tolist() for column in columns), strict=True))


def test_pieces_of_random_meshes_say_the_same_shards():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        for shards in random_side(random_model(rng), rng, is_tied=False).shards():
            again = from_pieces(shards.tensors, shards.layout, shards.pieces)
            assert again.layout == shards.layout
            assert rows_of(again) == rows_of(shards)


def test_what_was_offered_and_is_not_used_is_remembered_by_name_alone():
    offered = [TensorInfo(f"expert.{n}", "float32", (4, 6)) for n in range(500)]
    shards = from_pieces(offered, local((4, 6)), Pieces.of([Piece(7, (0, 0), (4, 6), 0, 0, (6, 1))]))
    assert [info.name for info in shards.tensors] == ["expert.7"]
    assert len(shards.to_bytes()) < 5000
    assert Shards.from_bytes(shards.to_bytes()) == shards
    with pytest.raises(ConfigError):
        from_pieces([*offered, offered[0]], local((4, 6)), Pieces.of([]))


def test_a_replicated_rank_has_the_layout_of_its_tensors():
    specs = [
        TensorSpec("a", "float32", (2, 3), (3, 1), "cpu", 4096),
        TensorSpec("e", "int8", (0, 2)),
        TensorSpec("s", "int8", ()),
    ]
    specs.append(TensorSpec("tied", "float32", (2, 3), (3, 1), "cpu", 4096))
    shards = replicated(specs)
    assert shards.layout == build_layout(specs)
    assert shards.table.alias.tolist() == [0, 1, 2, 0]


@given(st.lists(st.tuples(st.integers(0, 200), st.booleans()), max_size=20), st.sampled_from([64, 256, 4096]))
def test_local_tensors_are_packed_as_layouts_are(sizes, arena_nbytes):
    first = {}
    tied = [first.setdefault(size, at) if is_tied else at for at, (size, is_tied) in enumerate(sizes)]
    specs = [
        TensorSpec(str(at), "int8", (size,), (1,), "cpu", (tied[at] + 1) << 20) for at, (size, _) in enumerate(sizes)
    ]
    layout = build_layout(specs, arena_nbytes=arena_nbytes)
    places, arenas = pack(
        np.array([size for size, _ in sizes], np.int64), np.array(tied, np.int64), arena_nbytes=arena_nbytes
    )
    assert tuple(arenas.tolist()) == layout.arenas
    for place, entry in zip(places.tolist(), layout.entries, strict=True):
        assert place == (entry.arena << ARENA_SHIFT | entry.offset if entry.nbytes else -1)


@given(st.binary(max_size=300))
def test_noise_is_no_shards(data):
    with pytest.raises(IntegrityError):
        Shards.from_bytes(data)


@given(st.integers(0, 20), st.data())
def test_damaged_shards_are_refused_or_valid(seed, data):
    rng = np.random.default_rng(seed)
    raw = bytearray(random_side(random_model(rng), rng, is_tied=True).shards()[0].to_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        shards = Shards.from_bytes(bytes(raw))
    except IntegrityError:
        return
    pieces, entries = shards.pieces, shards.layout.entries
    last = pieces.offset + ((pieces.size - 1) * pieces.stride).sum(axis=1)
    for number, entry in enumerate(pieces.entry.tolist()):
        assert 0 <= last[number] < np.prod(entries[entry].shape, dtype=int)


@given(st.data())
def test_truncated_shards_are_refused(data):
    rng = np.random.default_rng(3)
    raw = random_side(random_model(rng), rng, is_tied=True).shards()[0].to_bytes()
    with pytest.raises(IntegrityError):
        Shards.from_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])


def test_a_rank_that_the_table_lacks_is_refused():
    shards = declare([A], TWO, (Shard(0),), (0,))
    for rank in (-1, 2):
        with pytest.raises(IntegrityError):
            Shards.at(shards.table, rank)


WRONG_PIECES = {
    "no such tensor": Piece(1, (0, 0), (4, 6), 0, 0, (6, 1)),
    "no such local tensor": Piece(0, (0, 0), (4, 6), 1, 0, (6, 1)),
    "outside the full tensor": Piece(0, (1, 0), (4, 6), 0, 0, (6, 1)),
    "before the full tensor": Piece(0, (-1, 0), (4, 6), 0, 0, (6, 1)),
    "outside the local tensor": Piece(0, (0, 0), (4, 6), 0, 1, (6, 1)),
    "before the local tensor": Piece(0, (0, 0), (2, 6), 0, -1, (6, 1)),
    "backwards": Piece(0, (0, 0), (4, 6), 0, 18, (-6, 1)),
    "all in one place": Piece(0, (0, 0), (4, 6), 0, 0, (0, 0)),
    "rows over each other": Piece(0, (0, 0), (4, 6), 0, 0, (3, 1)),
    "too far": Piece(0, (0, 0), (4, 6), 0, 0, (1 << 61, 1)),
}


@pytest.mark.parametrize("case", WRONG_PIECES)
def test_a_piece_that_cannot_be_is_refused(case):
    with pytest.raises(ConfigError):
        from_pieces([A], local((4, 6)), Pieces.of([WRONG_PIECES[case]]))


def test_a_piece_of_uneven_dimensions_is_refused():
    with pytest.raises(ConfigError):
        Pieces.of([Piece(0, (0, 0), (4, 6), 0, 0, (6,))])


def test_transposed_pieces_are_fine():
    shards = from_pieces([A], local((6, 4)), Pieces.of([Piece(0, (0, 0), (4, 6), 0, 0, (1, 4))]))
    assert shards.pieces.stride.tolist() == [[1, 4]]


WRONG_DECLARATIONS = {
    "two of one name": {"infos": [A, A]},
    "two local ones of one name": {"renamed": {"a": "b"}},
    "fused twice": {"fused": {"x": Concat(0, ("a", "b")), "y": Stack(("a",))}},
    "no such tensor": {"fused": {"x": Concat(0, ("a", "c"))}},
    "no such tied tensor": {"tied": {"c": "a"}},
    "tied but unlike": {"infos": [A, TensorInfo("b", "int32", (4, 6))], "tied": {"b": "a"}},
    "fused but of two dtypes": {"infos": [A, TensorInfo("b", "int32", (4, 6))], "fused": {"x": Stack(("a", "b"))}},
    "fused but of two shapes": {"infos": [A, TensorInfo("b", "float32", (4, 5))], "fused": {"x": Stack(("a", "b"))}},
    "joined along no dimension": {"fused": {"x": Concat(2, ("a", "b"))}},
    "longer than its length": {"fused": {"x": Concat(0, ("a", "b"), length=3)}},
    "padded to less": {"padded": {"a": (3, 6)}},
    "flat and padded": {"padded": {"a": (5, 6)}, "placements": (Flat(),)},
    "without placement": {"placements": {"a": (Replicate(),)}},
    "of unknown dtype": {"infos": [TensorInfo("a", "float31", (4, 6))]},
}


@pytest.mark.parametrize("case", WRONG_DECLARATIONS)
def test_a_declaration_that_cannot_be_is_refused(case):
    given_ = {"infos": [A, B], "placements": (Shard(0),)} | WRONG_DECLARATIONS[case]
    with pytest.raises(ConfigError):
        declare(given_.pop("infos"), TWO, given_.pop("placements"), (0,), **given_)


def test_a_stack_holds_only_the_experts_of_its_rank():
    infos = [TensorInfo(f"e{n}", "float32", (2, 3)) for n in range(4)]
    shards = declare(
        infos, TWO, lambda name: (Owner(int(name[1]) // 2),), (1,), fused={"experts": Stack(("e0", "e1", "e2", "e3"))}
    )
    (entry,) = shards.layout.entries
    assert (entry.name, entry.shape) == ("experts", (2, 2, 3))
    assert [shards.tensors[at].name for at in shards.pieces.tensor] == ["e2", "e3"]
    assert shards.pieces.offset.tolist() == [0, 6]


def test_ranks_that_hold_the_same_have_one_digest():
    mesh = Mesh((("dp", 2), ("tp", 2)))
    table = declare([A, B], mesh, (Replicate(), Shard(1)), (0, 0)).table
    assert [Shards(table, rank).digest for rank in (0, 1)] == [Shards(table, rank).digest for rank in (2, 3)]
    assert Shards(table, 0).digest != Shards(table, 1).digest
