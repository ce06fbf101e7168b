"""Sums of rows in both cores and all variants: the bits of plain torch, rounded once, to nearest even."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_tools import MIB, address_of

from raynixl.native import DONE, STALE, Gate, Native, load
from raynixl.native.moe import BF16, F16, F32, F64

pytestmark = pytest.mark.pure

quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

DTYPES = {F32: torch.float32, BF16: torch.bfloat16, F16: torch.float16, F64: torch.float64}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SMALL = [torch.float32, torch.bfloat16, torch.float16]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
hiddens = st.integers(1, 80) | st.sampled_from([127, 128, 129, 1024, 2880, 3584, 7168, 8192])


@dataclass
class Case:
    """Rows of some tokens, and what else goes into their sums."""

    rows: torch.Tensor
    lengths: list[int]
    out: torch.dtype
    weights: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    biases: list[torch.Tensor] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    def reduce(self, core: Native, variant: int | None = None, skew: int = 0) -> tuple[int, torch.Tensor]:
        """Sum in a core; the rows are given by address, the result may begin anywhere."""
        tokens, hidden = len(self.lengths), self.rows.shape[1]
        stride = hidden * self.out.itemsize + skew
        memory = np.full(tokens * stride + 64, 0xA5, np.uint8)
        addresses = self.rows.data_ptr() + self.rows.stride(0) * self.rows.itemsize * np.arange(len(self.rows))
        bias_dtype = self.biases[0].dtype if self.biases else torch.float32
        code = core.reduce_rows(
            address_of(memory) + skew,
            stride,
            CODES[self.out],
            np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64),
            addresses.astype(np.uint64),
            CODES[self.rows.dtype],
            None if self.weights is None else self.weights.numpy(),
            hidden,
            np.array([bias.data_ptr() for bias in self.biases], np.uint64),
            hidden * bias_dtype.itemsize,
            CODES[bias_dtype],
            self.gates,
            None if self.scale is None else self.scale.numpy(),
            **({} if variant is None else {"variant": variant}),
        )
        body = memory[skew : skew + tokens * stride].reshape(tokens, stride)
        assert (memory[:skew] == 0xA5).all()
        assert (body[:, hidden * self.out.itemsize :] == 0xA5).all()
        found = torch.empty(tokens, hidden, dtype=self.out)
        found.view(torch.uint8).numpy()[:] = body[:, : hidden * self.out.itemsize]
        return code, found

    def expected(self) -> torch.Tensor:
        """Sum by the definition, with plain torch."""
        wide = torch.float64 if self.rows.dtype == torch.float64 else torch.float32
        sums, first = [], 0
        for token, length in enumerate(self.lengths):
            terms = [self.rows[row].to(wide) for row in range(first, first + length)]
            if self.weights is not None:
                terms = [
                    t * self.weights[row].to(wide) for t, row in zip(terms, range(first, first + length), strict=True)
                ]
            total = in_order(terms)
            if total is not None and self.scale is not None:
                total = total * self.scale[token].to(wide)
            total = in_order([*([] if total is None else [total]), *[bias[token].to(wide) for bias in self.biases]])
            sums.append(torch.zeros(self.rows.shape[1], dtype=wide) if total is None else total)
            first += length
        return torch.stack(sums).to(self.out) if sums else torch.empty(0, self.rows.shape[1], dtype=self.out)


def in_order(terms: list[torch.Tensor]) -> torch.Tensor | None:
    """Add terms from the left."""
    total = None
    for term in terms:
        total = term if total is None else total + term
    return total


def check(case: Case, core: Native, skew: int = 0) -> None:
    """Compare every variant with the definition, by bits; a NaN need only be one."""
    expected = case.expected()
    results = [case.reduce(core, variant, skew) for variant in range(core.REDUCE_VARIANTS)]
    for code, found in results:
        assert code == DONE
        same = bits(found) == bits(expected)
        assert (same | (found.isnan() & expected.isnan())).all()
        assert torch.equal(bits(found), bits(results[0][1]))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of numbers, as integers."""
    return tensor.contiguous().view(BITS[tensor.itemsize])


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers of all sizes, some of them special."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape) * 2.0 ** random.integers(-20, 20, shape)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 6e-8, 65504.0, 65520.0, 3.4e38, 1e-45])
    chosen = random.random(shape) < 0.05
    values[chosen] = random.choice(special, int(chosen.sum()))
    return torch.from_numpy(values).to(dtype)


@quick
@given(
    data=st.data(),
    hidden=hiddens,
    lengths=st.lists(st.integers(0, 5), max_size=6),
    source=st.sampled_from([*SMALL, torch.float64]),
    skew=st.integers(0, 9),
)
def test_sums_have_the_bits_of_their_definition(
    core: Native, data: st.DataObject, hidden: int, lengths: list[int], source: torch.dtype, skew: int
) -> None:
    wide = source == torch.float64
    out = source if wide else data.draw(st.sampled_from(SMALL))
    count, offset = sum(lengths), data.draw(st.integers(0, 3))
    rows = numbers((count, hidden + offset), source, hidden)[:, offset:]
    case = Case(rows, lengths, out)
    if data.draw(st.booleans()):
        case.weights = numbers((count,), torch.float32, count)
    if data.draw(st.booleans()):
        case.scale = numbers((len(lengths),), torch.float32, count + 1)
    bias = data.draw(st.sampled_from([*SMALL, torch.float64] if wide else SMALL))
    for which in range(data.draw(st.integers(0, 2))):
        case.biases.append(numbers((len(lengths), hidden), bias, which))
    check(case, core, skew)


@pytest.mark.parametrize("out", SMALL)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_kind_of_number_is_rounded_to_nearest_even(core: Native, out: torch.dtype, weighted: bool) -> None:
    ends = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    rows = ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | ends).reshape(1, -1).view(np.float32)
    case = Case(torch.from_numpy(rows), [1], out, biases=[torch.zeros_like(torch.from_numpy(rows))])
    if weighted:
        case.weights, case.biases = torch.ones(1), []
    check(case, core)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_every_half_is_widened_as_it_is(core: Native, source: torch.dtype) -> None:
    rows = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(source).reshape(1, -1)
    check(Case(rows, [1], torch.float32), core)


@pytest.mark.parametrize("dtype", [*SMALL, torch.float64])
def test_one_row_alone_is_copied_byte_for_byte(core: Native, dtype: torch.dtype) -> None:
    random = np.random.default_rng(0).integers(0, 256, (3, 1000 * dtype.itemsize), np.uint8)
    rows = torch.from_numpy(random).view(dtype)
    for variant in range(core.REDUCE_VARIANTS):
        _, found = Case(rows, [1, 1, 1], dtype).reduce(core, variant)
        assert torch.equal(bits(found), bits(rows))


@pytest.mark.parametrize("dtype", [*SMALL, torch.float64])
def test_a_nan_that_is_computed_is_the_canonical_one(both: tuple[Native, Native], dtype: torch.dtype) -> None:
    rows = torch.full((2, 37), float("nan"), dtype=dtype)
    rows[0] = -rows[0]
    rows[1, ::2] = 1.0
    canonical = {2: 0x7FC0 if dtype == torch.bfloat16 else 0x7E00, 4: 0x7FC00000, 8: 0x7FF8 << 48}[dtype.itemsize]
    for core in both:
        for variant in range(core.REDUCE_VARIANTS):
            assert (bits(Case(rows, [2], dtype).reduce(core, variant)[1]) == canonical).all()


def test_a_token_without_rows_is_zero_or_its_biases(core: Native) -> None:
    rows, bias = torch.ones(2, 50, dtype=torch.bfloat16), numbers((3, 50), torch.bfloat16, 0)
    _, found = Case(rows, [0, 2, 0], torch.bfloat16).reduce(core)
    assert found[0].eq(0).all()
    assert found[1].eq(2).all()
    _, found = Case(rows[:0], [0, 0, 0], torch.bfloat16, biases=[bias], scale=torch.full((3,), torch.inf)).reduce(core)
    assert torch.equal(found.isnan(), bias.isnan())
    assert torch.equal(bits(found)[~bias.isnan()], bits(bias)[~bias.isnan()])


def test_denormals_and_rounding_do_not_depend_on_the_thread() -> None:
    core = load(native=True)
    if core.NAME != "native":
        pytest.skip("numpy follows the thread's setting")
    case = Case(numbers((6, 300), torch.float32, 3) * 1e-38, [3, 3], torch.float32)
    expected = case.expected()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps denormals")
    try:
        results = [case.reduce(core, variant)[1] for variant in range(core.REDUCE_VARIANTS)]
        flushed = torch.tensor(1e-40) * 1
    finally:
        torch.set_flush_denormal(False)
    assert flushed == 0
    for found in results:
        assert torch.equal(bits(found)[~expected.isnan()], bits(expected)[~expected.isnan()])


# What is refused


def test_a_closed_gate_refuses_and_nothing_is_summed(core: Native) -> None:
    gates = [core.Gate(), core.Gate()]
    case = Case(torch.ones(4, 9), [2, 2], torch.float32, gates=gates)
    code, _ = case.reduce(core)
    assert code == DONE
    gates[1].close(STALE)
    code, found = case.reduce(core)
    assert code == STALE
    assert (found.view(torch.uint8) == 0xA5).all()
    assert [gate.inflight for gate in gates] == [0, 0]


def test_closing_a_gate_stops_a_long_sum(core: Native) -> None:
    gate, rows = core.Gate(), torch.ones(4, MIB)
    case, codes = Case(rows, [2, 2], torch.bfloat16, gates=[gate]), [DONE]

    def run() -> None:
        while codes[-1] == DONE:
            codes.append(case.reduce(core)[0])

    thread = threading.Thread(target=run)
    thread.start()
    while gate.inflight == 0:
        pass
    gate.close(STALE)
    assert gate.drain(30.0)
    thread.join(30.0)
    assert codes[-1] == STALE


@pytest.mark.parametrize(
    "change",
    [
        {"out_code": 4},
        {"in_code": -1},
        {"out_code": F64},
        {"in_code": F64},
        {"bias_code": F64},
        {"bias_code": 9},
        {"starts": np.array([0, 2, 5], np.int64)},
        {"starts": np.array([-1, 2, 4], np.int64)},
        {"starts": np.array([0, 3, 2], np.int64)},
        {"starts": np.array([], np.int64)},
        {"weights": np.zeros(3, np.float32)},
        {"scale": np.zeros(3, np.float32)},
    ],
)
def test_arguments_that_do_not_fit_are_refused(core: Native, change: dict) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the two cores word it alike, but promise only the type
        core.reduce_rows(**(arguments() | change))


@pytest.mark.parametrize(
    "change",
    [
        {"starts": np.array([0, 2, 4], np.int32)},
        {"rows": np.zeros(4, np.int64)},
        {"rows": np.zeros(8, np.uint64)[::2]},
        {"weights": np.zeros(4, np.float64)},
        {"scale": np.zeros((2, 1), np.float32)},
        {"biases": np.zeros(1, np.int64)},
    ],
)
def test_arguments_of_another_form_are_refused(core: Native, change: dict) -> None:
    with pytest.raises(TypeError):
        core.reduce_rows(**(arguments() | change))


def arguments() -> dict:
    """Arguments that fit, over memory that may be summed."""
    memory = np.zeros(4096, np.uint8)
    return {
        "dst": address_of(memory),
        "dst_stride": 64,
        "out_code": F32,
        "starts": np.array([0, 2, 4], np.int64),
        "rows": np.full(4, address_of(memory) + 1024, np.uint64),
        "in_code": BF16,
        "weights": np.ones(4, np.float32),
        "hidden": 16,
        "biases": np.array([address_of(memory) + 2048], np.uint64),
        "bias_stride": 64,
        "bias_code": F16,
        "gates": [],
        "scale": np.ones(2, np.float32),
    }
