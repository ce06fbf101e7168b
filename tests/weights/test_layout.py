"""Layouts: every tensor has a place of its own unless it is tied; layouts travel unharmed or not at all."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynixl.errors import ConfigError, IntegrityError
from raynixl.weights.difference import MAX_ROWS, difference, table
from raynixl.weights.layout import ALIGNMENT, Layout, build_layout, itemsize
from raynixl.weights.sharing import TensorSpec

pytestmark = pytest.mark.pure

DTYPES = ("float32", "bfloat16", "bool", "int8", "complex64", "float8_e4m3fn", "int64")


def contiguous(shape):
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def spec(name, shape=(2, 3), dtype="float32", *, at=0, strides=None):
    return TensorSpec(name, dtype, tuple(shape), contiguous(shape) if strides is None else strides, "cpu", at)


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
models = st.lists(
    st.tuples(st.text(max_size=12), shapes, st.sampled_from(DTYPES)), max_size=20, unique_by=lambda one: one[0]
)


@settings(deadline=None)
@given(models, st.sampled_from([64, 256, 4096]))
def test_places_are_aligned_disjoint_and_inside(model, arena_nbytes):
    layout = build_layout([spec(*one) for one in model], arena_nbytes=arena_nbytes)
    ends = {}
    for entry in layout.entries:
        if entry.nbytes:
            assert entry.offset % ALIGNMENT == 0
            assert entry.offset >= ends.get(entry.arena, 0)
            ends[entry.arena] = entry.offset + entry.nbytes
            assert ends[entry.arena] <= layout.arenas[entry.arena]
    assert [entry.name for entry in layout.entries] == [one[0] for one in model]


@settings(deadline=None)
@given(models)
def test_a_layout_travels_unharmed(model):
    layout = build_layout([spec(*one) for one in model], arena_nbytes=256)
    again = Layout.from_bytes(layout.to_bytes())
    assert again == layout
    assert again.digest == layout.digest
    assert difference(layout, again) == []


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_no_layout(data):
    with pytest.raises(IntegrityError):
        Layout.from_bytes(data)


@given(models.filter(len), st.data())
def test_a_damaged_layout_is_refused_or_valid(model, data):
    raw = bytearray(build_layout([spec(*one) for one in model]).to_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        layout = Layout.from_bytes(bytes(raw))
    except IntegrityError:
        return
    for entry in layout.entries:
        assert entry.nbytes == 0 or entry.offset + entry.nbytes <= layout.arenas[entry.arena]


@settings(deadline=None)
@given(models.filter(len), st.data())
def test_a_truncated_layout_is_refused(model, data):
    raw = build_layout([spec(*one) for one in model]).to_bytes()
    with pytest.raises(IntegrityError):
        Layout.from_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])


@settings(deadline=None)
@given(models, st.sampled_from([4096, 8192]))
def test_chunks_cover_every_arena_once(model, chunk_nbytes):
    layout = build_layout([spec(name, (*shape, 700), dtype) for name, shape, dtype in model], arena_nbytes=16384)
    reached = [0] * len(layout.arenas)
    for arena, offset, nbytes in layout.chunks(chunk_nbytes).tolist():
        assert offset == reached[arena]
        assert 0 < nbytes <= chunk_nbytes
        reached[arena] += nbytes
    assert tuple(reached) == layout.arenas


def test_seventy_thousand_tensors_travel():
    layout = build_layout(
        [spec(f"model.layers.{n}.mlp.experts.up_proj.weight", at=4096 * (n + 1)) for n in range(70_000)]
    )
    data = layout.to_bytes()
    assert len(data) < 16 << 20
    assert Layout.from_bytes(data) == layout
    assert difference(layout, layout) == []


TIES = {
    "same tensor": ([spec("a", at=4096), spec("b", at=4096)], 64, True),
    "another shape of it": ([spec("a", at=4096), spec("b", (6,), at=4096)], 128, False),
    "transposed view": ([spec("a", at=4096), spec("b", (3, 2), at=4096, strides=(1, 3))], 128, False),
    "part of it": ([spec("a", (64,), at=4096), spec("b", (8,), at=4096 + 32)], 320, False),
    "neighbours": ([spec("a", (64,), at=4096), spec("b", (64,), at=4096 + 256)], 512, False),
    "empty": ([spec("a", (0,), at=4096), spec("b", (0,), at=4096)], 0, True),
    "odd strides": ([spec("a", (1, 8), at=64, strides=(8, 1)), spec("b", (1, 8), at=64, strides=(9, 1))], 64, True),
}  # fmt: skip


@pytest.mark.parametrize("case", TIES)
def test_ties_are_carried_once(case):
    specs, nbytes, is_one = TIES[case]
    layout = build_layout(specs)
    assert layout.nbytes == nbytes
    assert (layout.entries[0].place == layout.entries[1].place) is is_one


@pytest.mark.parametrize(
    ("specs", "shares"),
    [
        ([spec("a", at=4096), spec("b", (3, 2), at=4096, strides=(1, 3))], True),
        ([spec("a", (8, 2), at=4096, strides=(4, 1)), spec("b", (8, 2), at=4096 + 8, strides=(4, 1))], False),
        ([spec("a", (8, 3), at=4096, strides=(4, 1)), spec("b", (8, 2), at=4096 + 8, strides=(4, 1))], True),
    ],
)
def test_only_shared_bytes_count_as_sharing(specs, shares):
    layout = build_layout(specs)
    assert all(bool(entry.sharing) is shares for entry in layout.entries)


def test_what_differs_is_told_by_name():
    source = build_layout([spec("same"), spec("shape", (2, 3)), spec("dtype"), spec("only.source"), spec("both", (4,))])
    target = build_layout(
        [
            spec("same"),
            spec("shape", (3, 2)),
            spec("dtype", dtype="bfloat16"),
            spec("only.target"),
            spec("both", (5,), "int8"),
        ]
    )
    rows = {row.name: row.reason for row in difference(source, target)}
    assert rows == {
        "shape": "shape differs",
        "dtype": "dtype differs",
        "only.source": "unexpected: the target has none",
        "both": "shape and dtype differ",
        "only.target": "missing at the source",
    }
    text = table(difference(source, target))
    assert "float32 [2, 3]" in text
    assert "bfloat16 [2, 3]" in text


def test_order_does_not_matter_and_long_tables_end():
    source, target = [spec(f"t{n}") for n in range(99)], [spec(f"t{n}") for n in reversed(range(99))]
    assert difference(build_layout(source), build_layout(target)) == []
    other = [spec(f"u{n}") for n in range(99)]
    lines = table(difference(build_layout(source), build_layout(other))).splitlines()
    assert len(lines) == MAX_ROWS + 2
    assert "and 178 more" in lines[-1]


def test_a_tie_at_the_target_alone_is_a_difference():
    apart = build_layout([spec("a", at=4096), spec("b", at=8192)])
    tied = build_layout([spec("a", at=4096), spec("b", at=4096)])
    view = build_layout([spec("a", (3, 3), at=4096), spec("b", (3, 3), at=4096, strides=(1, 3))])
    plain = build_layout([spec("a", (3, 3), at=4096), spec("b", (3, 3), at=8192)])
    assert [row.name for row in difference(apart, tied)] == ["b"]
    assert difference(tied, apart) == []
    assert [row.name for row in difference(plain, view)] == ["b"]
    assert difference(view, view) == []
    assert difference(view, plain) == []


def test_unknown_dtypes_and_names_used_twice_are_refused():
    with pytest.raises(ConfigError, match="qint8"):
        itemsize("qint8")
    with pytest.raises(ConfigError, match="one name"):
        build_layout([spec("a"), spec("a")])
