"""The weights benchmark on a tiny model: its rows keep the contract, every way brings the bytes, nothing is left."""

import json

import psutil
import pytest
from typer.testing import CliRunner

from raynixl.bench import weights
from raynixl.bench.crew import ProcessCrew
from raynixl.bench.plot import plot_weights
from raynixl.bench.shapes import count_nbytes, infos_of, make_module
from raynixl.bench.sizes import parse_counts
from raynixl.bench.weights import OwnWay, WeightsSpec, run_weights
from raynixl.cli import app
from raynixl.errors import ConfigError

CONTRACT = {
    "bench": str, "impl": str, "model": str, "receivers": int, "gbps": float, "seconds": float,
    "source_egress_nbytes": int, "flip_ms": float, "verified": bool,
}  # fmt: skip
TINY = count_nbytes(infos_of("tiny"))


@pytest.fixture(autouse=True)
def _leaves_no_child_behind():
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


def check(rows, receivers):
    for row in rows:
        assert {name: type(value) for name, value in row.items()} == CONTRACT
        assert (row["bench"], row["model"], row["receivers"]) == ("weights", "tiny", receivers)
        assert row["verified"] is True
        assert row["gbps"] == pytest.approx(TINY * receivers / row["seconds"] / 1e9, rel=1e-3)


@pytest.mark.parametrize(("install", "is_in_place"), [("auto", False), ("copy", True)])
def test_every_way_without_ray_brings_the_weights_to_every_receiver(install, is_in_place):
    rows = list(run_weights(WeightsSpec("tiny", 2, 1, ("gloo", "transfer"), install, is_in_place)))
    assert [row["impl"] for row in rows] == ["raynixl", "gloo", "transfer"]
    check(rows, 2)
    egress = {row["impl"]: row["source_egress_nbytes"] for row in rows}
    assert TINY <= egress["raynixl"] <= 2.1 * TINY
    assert (egress["gloo"], egress["transfer"]) == (2 * TINY, 2 * TINY)


@pytest.mark.parametrize(("memory", "baselines"), [("disk", ()), ("vram", ("gloo",))])
def test_memory_that_cannot_be_measured_is_refused(memory, baselines):
    with pytest.raises(ConfigError, match=r"memory"):
        WeightsSpec("tiny", 1, 1, baselines, memory=memory).check()


@pytest.mark.ray
@pytest.mark.pure
def test_ray_s_own_ways_bring_the_same_weights_in_the_same_run():
    left_out = []
    rows = list(run_weights(WeightsSpec("tiny", 2, 1, ("ray", "rdt", "gloo")), skipped=left_out.append))
    impls = [row["impl"] for row in rows]
    check(rows, 2)
    assert [impl for impl in impls if impl != "rdt"] == ["raynixl", "ray", "gloo"]
    assert ("rdt" in impls) == (not left_out)
    assert next(row for row in rows if row["impl"] == "ray")["source_egress_nbytes"] == TINY


def test_receivers_feed_each_other_where_that_is_asked_for():
    (row,) = run_weights(WeightsSpec("tiny", 3, 2, topology="relay"))
    check([row], 3)
    assert row["source_egress_nbytes"] <= 3 * TINY


def test_weights_that_do_not_arrive_are_noticed(monkeypatch):
    run = OwnWay.run
    monkeypatch.setattr(OwnWay, "run", lambda way: run(way) if way._version < 2 else [{"at": 0.0, "flip_ms": 0.0}])
    (row,) = run_weights(WeightsSpec("tiny", 1, 1))
    assert row["verified"] is False


def test_every_round_carries_other_weights(monkeypatch):
    seeds = []
    some = ProcessCrew.some

    def note(crew, do, ranks, **fields):
        if do == "fill":
            seeds.append(fields["seed"])
        return some(crew, do, ranks, **fields)

    monkeypatch.setattr(ProcessCrew, "some", note)
    list(run_weights(WeightsSpec("tiny", 1, 2, ("gloo",), is_verified=False)))
    assert len(seeds) == len(set(seeds)) == 1 + 2 * 3


def test_qwen_has_its_real_shapes():
    infos = infos_of("qwen2.5-0.5b")
    assert (len(infos), count_nbytes(infos)) == (290, 988_065_536)
    assert {info.name: info.shape for info in infos}["model.layers.23.self_attn.k_proj.weight"] == (128, 896)
    made = {name: (str(one.dtype), tuple(one.shape)) for name, one in make_module(infos_of("tiny")).named_parameters()}
    assert made == {info.name: (f"torch.{info.dtype}", info.shape) for info in infos_of("tiny")}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (WeightsSpec("tiny", 1, 1, ("nccl",)), "no baseline 'nccl'"),
        (WeightsSpec("gpt-2", 1, 1), "no model 'gpt-2'"),
        (WeightsSpec("qwen2.5-0.5b", 64, 1, ("transfer",)), "are needed"),
    ],
)
def test_what_cannot_be_measured_is_refused(spec, message, monkeypatch):
    monkeypatch.setattr(weights, "available_nbytes", lambda: 64 << 30)
    with pytest.raises(ConfigError, match=message):
        list(run_weights(spec))


@pytest.mark.parametrize("text", ["0", "65", "1,,2", "two", "-1", "1.5"])
def test_receivers_are_whole_numbers(text):
    with pytest.raises(ConfigError, match="1 to 64"):
        parse_counts(text)


def test_the_command_prints_a_line_for_each_way_and_number_of_receivers(tmp_path):
    picture = tmp_path / "a.svg"
    options = ("--model", "tiny", "--receivers", "1,2", "--rounds", "1", "--baseline", "gloo")
    shown = CliRunner().invoke(app, ["bench", "weights", *options, "--json", "--plot", str(picture)])
    assert shown.exit_code == 0, shown.output
    rows = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [(row["impl"], row["receivers"]) for row in rows] == [
        ("raynixl", 1), ("gloo", 1), ("raynixl", 2), ("gloo", 2),
    ]  # fmt: skip
    assert "<svg" in picture.read_text()
    plot_weights(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
