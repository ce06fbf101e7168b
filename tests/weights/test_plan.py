"""A plan matches what targets need to what sources hold, names what does not fit, and is a value."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reshard_models import random_model, random_side
from reshard_tools import carry_out

from raynixl.errors import ConfigError, IntegrityError
from raynixl.weights.declare import Concat, declare
from raynixl.weights.layout import build_layout
from raynixl.weights.pieces import Piece, Pieces, TensorInfo
from raynixl.weights.placement import Mesh, Owner, Replicate, Shard
from raynixl.weights.plan import Plan, plan
from raynixl.weights.shards import Shards, from_pieces, replicated
from raynixl.weights.sharing import TensorSpec

pytestmark = pytest.mark.pure

MIB = 1 << 20


def spec(name, shape=(2, 3), dtype="float32", *, at=0, strides=None):
    own = tuple(np.cumprod([1, *shape[:0:-1]])[::-1].tolist()) if shape else ()
    return TensorSpec(name, dtype, shape, own if strides is None else strides, "cpu", at)


def whole(*specs):
    return replicated(list(specs))


def ranks(infos, mesh, placements, **more):
    table = declare(infos, mesh, placements, (0,) * len(mesh.dims), **more).table
    return [Shards(table, rank) for rank in range(table.ranks)]


def names(layout):
    return [entry.name for entry in layout.entries]


def test_a_replicated_model_comes_in_one_run_a_chunk_into_a_layout_like_its_own():
    model = whole(*(spec(f"layer.{n}", (1024, 64 * n)) for n in range(1, 9)))
    made = plan([model, model], [model, model, model])
    assert made.parts == ((0, 1),)
    assert made.image_of == (0, 0, 0)
    assert made.images[0] == model.layout
    cuts = made.incoming(0).cut(made.images[0].arenas, MIB)
    assert [len(cuts[chunk]) for chunk in range(len(cuts))] == [1] * len(model.layout.chunks(MIB))
    assert (cuts.ranges.source_offset == cuts.ranges.offset).all()


def test_the_order_of_a_target_does_not_matter():
    model = [spec("a", (8,)), spec("b", (16,)), spec("e", (0,)), spec("c", ())]
    made = plan([whole(*model)], [whole(*model), whole(*model[::-1]), whole(*model)])
    assert made.image_of == (0, 0, 0)
    assert plan([whole(*model)], [whole(*model[::-1])]).images[0] == made.images[0]


def test_what_is_tied_at_the_source_alone_is_pulled_once_into_one_place():
    made = plan([whole(spec("a", at=4096), spec("b", at=4096))], [whole(spec("a"), spec("b"))])
    layout = made.images[0]
    assert layout.by_name["a"].place == layout.by_name["b"].place
    assert made.nbytes == (24,) == (made.incoming(0).nbytes,)


def test_a_name_that_the_source_lacks_is_fed_by_what_it_is_tied_to():
    made = plan([whole(spec("embed"))], [whole(spec("embed", at=4096), spec("head", at=4096))])
    assert sorted(names(made.images[0])) == ["embed", "head"]
    assert made.nbytes == (24,)


def test_a_name_that_the_target_lacks_is_not_missed_if_it_is_tied_to_one_that_it_has():
    made = plan([whole(spec("embed", at=4096), spec("head", at=4096))], [whole(spec("head"))])
    assert names(made.images[0]) == ["head"]


def test_a_tensor_that_is_copied_into_two_local_ones_is_pulled_once():
    layout = build_layout([spec("one"), spec("two")])
    copies = Pieces.of([Piece(0, (0, 0), (2, 3), entry, 0, (3, 1)) for entry in (0, 1)])
    made = plan([whole(spec("a"))], [from_pieces([TensorInfo("a", "float32", (2, 3))], layout, copies)])
    assert made.images[0].by_name["one"].place == made.images[0].by_name["two"].place
    assert made.nbytes == (24,)


def test_what_nothing_feeds_is_not_in_the_image_unless_it_is_tied_to_what_is_fed():
    specs = [spec("cache", (5,)), spec("weight", at=4096), spec("same", at=4096), spec("empty", (0, 2))]
    feeds = Pieces.of([Piece(0, (0, 0), (2, 3), 1, 0, (3, 1))])
    offered = [TensorInfo("a", "float32", (2, 3)), TensorInfo("unused", "int8", (7,))]
    made = plan([whole(spec("a"), spec("unused", (7,), "int8"))], [from_pieces(offered, build_layout(specs), feeds)])
    assert sorted(names(made.images[0])) == ["empty", "same", "weight"]
    assert made.nbytes == (24,)


def test_a_transposed_target_gets_its_elements_where_they_belong():
    info = TensorInfo("a", "float32", (2, 3))
    target = from_pieces([info], build_layout([spec("t", (3, 2))]), Pieces.of([Piece(0, (0, 0), (2, 3), 0, 0, (1, 2))]))
    made = plan([whole(spec("a"))], [target])
    values = np.arange(6, dtype=np.uint32).reshape(2, 3)
    (image,), _ = carry_out(made.incoming(0), [[np.frombuffer(values.tobytes(), np.uint8)]], made.images[0].arenas)
    assert np.array_equal(image[:24].view(np.uint32).reshape(3, 2), values.T)


def test_what_several_parts_hold_is_served_by_each_in_turn():
    infos = [TensorInfo(f"norm.{n}", "float32", (32,)) for n in range(8)] + [TensorInfo("w", "float32", (8, 4))]
    sources = ranks(infos, Mesh((("tp", 4),)), lambda name: (Shard(0) if name == "w" else Replicate(),))
    made = plan(sources, [whole(*(spec(info.name, info.shape) for info in infos))])
    assert made.nbytes == (8 * 128 + 128,)
    assert made.shares.tolist() == [[2 * 128 + 32] * 4]


def test_stages_of_a_target_need_only_their_own():
    infos = [TensorInfo(f"layer.{n}", "float32", (8,)) for n in range(4)]
    targets = ranks(infos, Mesh((("pp", 2),)), lambda name: (Owner(int(name[-1]) // 2),))
    made = plan([whole(*(spec(info.name, info.shape) for info in infos))], targets)
    assert [names(layout) for layout in made.images] == [["layer.0", "layer.1"], ["layer.2", "layer.3"]]
    assert [image for image, _ in made.outgoing(0)] == [0, 1]


Q, K = TensorInfo("q", "float32", (4, 3)), TensorInfo("k", "float32", (2, 3))
MISFITS = {
    "missing": ([whole(spec("a"))], [whole(spec("a"), spec("b"))], ["b", "missing at the source"]),
    "unexpected": ([whole(spec("a"), spec("b"))], [whole(spec("a"))], ["b", "unexpected: the target has none"]),
    "shape": ([whole(spec("a"))], [whole(spec("a", (3, 2)))], ["[2, 3]", "[3, 2]", "shape differs"]),
    "dtype": ([whole(spec("a"))], [whole(spec("a", dtype="int32"))], ["float32", "int32", "dtype differs"]),
    "both": ([whole(spec("a"))], [whole(spec("a", (3,), "int32"))], ["shape and dtype differ"]),
    "empty, of another shape": ([whole(spec("a", (0, 2)))], [whole(spec("a", (0, 3)))], ["shape differs"]),
    "tied at the target alone": (
        [whole(spec("a"), spec("b"))], [whole(spec("a", at=4096), spec("b", at=4096))],
        ["b", "shares memory with a", "tied at the target alone"],
    ),
    "overlapping at the target alone": (
        [whole(spec("a"), spec("t", (3, 2)))],
        [whole(spec("a", at=4096), spec("t", (3, 2), at=4096, strides=(1, 3)))], ["tied at the target alone"],
    ),
    "only a part of it is held": (
        ranks([Q], Mesh((("tp", 4),)), (Shard(0),))[:3], [whole(spec("q", (4, 3)))], ["some of it", "missing"]
    ),
    "nobody holds it": (
        ranks([Q, K], Mesh((("pp", 2),)), lambda name: (Owner(int(name == "k")),))[:1],
        [whole(spec("q", (4, 3)), spec("k", (2, 3)))], ["k", "none of it"],
    ),
    "sources disagree": (
        [whole(spec("a")), whole(spec("a", (3, 2)))], [whole(spec("a"))], ["the sources disagree"],
    ),
    "local tensors of another dtype": (
        [whole(spec("a"))],
        [from_pieces([TensorInfo("a", "float32", (2, 3))], build_layout([spec("w", dtype="bfloat16")]),
                     Pieces.of([Piece(0, (0, 0), (2, 3), 0, 0, (3, 1))]))], ["bfloat16 in w", "dtype differs"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_named(case):
    sources, targets, texts = MISFITS[case]
    with pytest.raises(ConfigError) as caught:
        plan(sources, targets)
    for text in texts:
        assert text in caught.value.message


def test_where_only_dtypes_differ_the_cast_is_named():
    with pytest.raises(ConfigError) as caught:
        plan([whole(spec("a"))], [whole(spec("a", dtype="bfloat16"))])
    assert "publish(cast=...)" in caught.value.hint


def test_views_that_overlap_alike_on_both_sides_fit():
    model = [spec("a", at=4096), spec("t", (3, 2), at=4096, strides=(1, 3))]
    made = plan([whole(*model)], [whole(*model)])
    assert made.images[0] == whole(*model).layout


def test_a_plan_without_sources_or_targets_is_refused():
    for sources, targets in (([], [whole(spec("a"))]), ([whole(spec("a"))], [])):
        with pytest.raises(ConfigError):
            plan(sources, targets)


def test_plans_are_values():
    infos = [TensorInfo("q", "float32", (8, 4)), TensorInfo("k", "float32", (4, 4))]
    sources = ranks(infos, Mesh((("fsdp", 4),)), (Shard(0),))
    targets = ranks(infos, Mesh((("tp", 2),)), (Shard(0),), fused={"qk": Concat(0, ("q", "k"))})
    one, two = plan(sources, targets), plan(list(sources), list(targets))
    assert one == two
    assert hash(one) == hash(two)
    assert one.digest == two.digest
    assert one != plan(sources, targets[:1])
    assert "4 sources in 4 parts to 2 targets" in str(one)
    assert "runs" in str(one.incoming(0))
    again = Plan.from_bytes(one.to_bytes())
    assert again == one
    for image in range(2):
        assert again.images[image] == one.images[image]
        assert again.incoming(image) == one.incoming(image)
    assert [again.outgoing(n) for n in range(4)] == [one.outgoing(n) for n in range(4)]


def test_targets_that_need_the_same_have_one_image_however_they_are_declared():
    infos = [TensorInfo("q", "float32", (8, 4)), TensorInfo("k", "float32", (4, 4))]
    declared = ranks(infos, Mesh((("tp", 2),)), (Shard(0),), fused={"qk": Concat(0, ("q", "k"))})
    recorded = [from_pieces(shards.tensors, shards.layout, shards.pieces) for shards in declared]
    made = plan([whole(spec("q", (8, 4)), spec("k", (4, 4)))], [*declared, *recorded])
    assert made.image_of == (0, 1, 0, 1)


@given(st.integers(0, 5), st.data())
def test_a_damaged_plan_is_refused_or_one_that_stays_inside(seed, data):
    rng = np.random.default_rng(seed)
    model = random_model(rng)
    side = random_side(model, rng, is_tied=False)
    raw = bytearray(plan(side.shards(), random_side(model, rng, is_tied=False).shards()).to_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        made = Plan.from_bytes(bytes(raw))
    except IntegrityError:
        return
    arenas = [made.sources[members[0]].layout.arenas for members in made.parts]
    for image in range(len(made.images)):
        made.incoming(image).check(arenas, made.images[image].arenas)


@pytest.mark.parametrize("data", [b"", b"\x00" * 4, b"\xff" * 64, bytes(range(200))])
def test_noise_is_no_plan(data):
    with pytest.raises(IntegrityError):
        Plan.from_bytes(data)
