"""The simulated MoE benchmark: its rows, and what cannot be simulated."""

import json

import pytest

from raynixl.bench.moe_simulate import SimulateSpec, run_simulation, sweep
from raynixl.bench.plot import plot_simulation
from raynixl.errors import ConfigError

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_two_stages_are_printed_against_flat(tmp_path, skew):
    spec = SimulateSpec(96, 12, tokens=16, experts=192, skew=skew)
    rows = list(run_simulation(spec))
    assert [(row["impl"], row["grid"]) for row in rows] == [
        ("flat", "-"), ("two-level", "12 x 8"), ("two-level, square", "8 x 12"),
    ]  # fmt: skip
    for row in rows:
        json.dumps(row, allow_nan=False)
        assert row["verified"] is True
        assert row["pair_messages"] == 2
        assert row["both_ms"] == pytest.approx(row["dispatch_ms"] + row["combine_ms"])
        assert (row["uniform_ms"] is None) == (skew > 0)
    flat, hosts, _ = rows
    assert [row["peers"] for row in rows] == [95, 18, 18]
    assert hosts["network_nbytes"] < flat["network_nbytes"]
    assert hosts["inside_nbytes"] > flat["inside_nbytes"]
    assert hosts["messages"] < flat["messages"] / 4
    if not skew:
        assert flat["uniform_ms"] == pytest.approx(flat["both_ms"], rel=0.1)
    plot_simulation(rows, tmp_path / "simulated.png")
    assert (tmp_path / "simulated.png").stat().st_size > 10_000


def test_fewer_ranks_fill_as_many_hosts_as_they_need():
    specs = sweep(SimulateSpec(hosts=128), [4, 64, 1024], [8])
    assert [(spec.ranks, spec.hosts) for spec in specs] == [(4, 1), (64, 8), (1024, 128)]


def test_a_faster_network_takes_less_time():
    times = [next(run_simulation(SimulateSpec(16, 4, tokens=64, link_gbps=gbps)))["both_ms"] for gbps in (10, 400)]
    assert times[0] > 2 * times[1]


@pytest.mark.parametrize(
    "spec",
    [SimulateSpec(4, 5), SimulateSpec(4, 0), SimulateSpec(8, 2, topk=9, experts=8), SimulateSpec(1024, 8, tokens=4096)],
)
def test_what_cannot_be_simulated_is_refused(spec):
    with pytest.raises(ConfigError):
        next(run_simulation(spec))
