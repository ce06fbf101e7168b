"""The MoE benchmark on a tiny load: its rows keep the contract, every way brings the sums, nothing is left behind."""

import json
import time

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from raynixl.bench import moe, moe_crew
from raynixl.bench.crew import ProcessCrew
from raynixl.bench.moe import MoeSpec, run_moe, step_seconds
from raynixl.bench.moe_crew import MpiCrew, find_mpiexec
from raynixl.bench.plot import plot_moe
from raynixl.cli import app
from raynixl.errors import ConfigError, PeerLost

CONTRACT = {
    "bench": str, "impl": str, "ranks": int, "tokens": int, "hidden": int, "topk": int, "experts": int, "dtype": str,
    "layout": str, "dispatch_ms": float, "combine_ms": float, "both_ms": float, "floor_ms": float, "floor": str,
    "dispatch_p99_ms": float, "combine_p99_ms": float, "p99_ms": float, "nbytes": int, "dispatch_messages": int,
    "combine_messages": int, "verified": bool,
}  # fmt: skip
TINY = {"ranks": 2, "hidden": 48, "topk": 2, "experts": 5, "rounds": 1}


def has_mpi():
    try:
        return bool(find_mpiexec())
    except ConfigError:
        return False


needs_mpi = pytest.mark.skipif(not has_mpi(), reason="MPI is not installed (pip install mpi4py mpich)")


@pytest.fixture(autouse=True)
def _leaves_no_child_behind():
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


def check(rows):
    for row in rows:
        is_ours = row["impl"] == "raynixl"
        kinds = {name: type(value) for name, value in row.items()}
        counted = {} if is_ours else {"dispatch_messages": type(None), "combine_messages": type(None)}
        assert kinds == CONTRACT | counted
        assert row["verified"] is True
        assert row["floor_ms"] > 0
        assert row["both_ms"] <= row["p99_ms"]
        assert row["floor"] in ("index_select", "put_rows")
    assert len({(row["tokens"], row["nbytes"], row["floor_ms"]) for row in rows}) == len(
        {row["tokens"] for row in rows}
    )


def test_every_way_brings_the_sums_of_several_numbers_of_tokens():
    rows = list(run_moe(MoeSpec((3, 40), baselines=("gloo", "gloo-index-add"), **TINY)))
    ways = ["raynixl", "gloo", "gloo-index-add"]
    assert [(row["tokens"], row["impl"]) for row in rows] == [(tokens, way) for tokens in (3, 40) for way in ways]
    check(rows)
    assert 40 * 2 * 96 < rows[-1]["nbytes"] <= 40 * 2 * 2 * 96  # each token to one rank or to both


@needs_mpi
@pytest.mark.pure
def test_mpi_brings_the_same_sums_in_the_same_run():
    rows = list(run_moe(MoeSpec((9,), baselines=("mpi", "mpi-split", "mpi-index-add"), **TINY)))
    assert [row["impl"] for row in rows] == ["raynixl", "mpi", "mpi-split", "mpi-index-add"]
    check(rows)


@pytest.mark.parametrize("layout", ["experts", "slots"])
def test_rows_are_verified_in_every_layout(layout):
    (row,) = run_moe(MoeSpec((17,), layout=layout, dtype="float32", **TINY))
    check([row])
    assert row["layout"] == layout


def test_tokens_that_are_not_those_expected_are_noticed(monkeypatch):
    some = ProcessCrew.some

    def ask(crew, do, ranks, **fields):
        if do != "verify":
            return some(crew, do, ranks, **fields)
        return crew.each(do, [{**fields, "seed": fields["seed"] + rank} for rank in ranks])  # rank 1 sends others

    monkeypatch.setattr(ProcessCrew, "some", ask)
    (row,) = run_moe(MoeSpec((9,), **TINY))
    assert row["verified"] is False


def test_a_step_lasts_from_the_first_begin_to_the_last_end():
    ranks = [[[100, 200], [1000, 1500]], [[150, 420], [900, 1400]]]
    assert step_seconds(ranks).tolist() == [320e-9, 600e-9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baselines": ("nccl",)}, "no baseline 'nccl'"),
        ({"dtype": "int8"}, "'int8' are not measured"),
        ({"layout": "rows"}, "no layout 'rows'"),
        ({"layout": "slots", "baselines": ("gloo",)}, "baselines have no layout 'slots'"),
        ({"topk": 9, "experts": 8}, "no 9 of 8 experts"),
        ({"tokens": (1 << 20,)}, "are needed"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(moe, "available_nbytes", lambda: 64 << 30)
    with pytest.raises(ConfigError, match=message):
        next(run_moe(MoeSpec(**options)))


def test_mpi_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(moe_crew.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="needs MPI and mpi4py") as raised:
        find_mpiexec()
    assert raised.value.hint == "pip install mpich mpi4py"


@needs_mpi
@pytest.mark.pure
def test_a_rank_of_mpi_that_is_killed_is_told_and_the_others_end():
    from contextlib import ExitStack

    with ExitStack() as stack:
        crew = MpiCrew(stack, 2)
        ranks = [one for one in psutil.Process().children(recursive=True) if "raynixl.bench.moe_mpi" in one.cmdline()]
        victim = next(one for one in ranks if "mpiexec" not in one.name())
        victim.kill()
        with pytest.raises(PeerLost, match="rank of MPI ended"):
            crew.some("load", range(2), load={}, impls=[], seed=0)
        began = time.monotonic()
    assert time.monotonic() - began < 20


def test_the_command_prints_a_line_for_each_way_and_number_of_tokens(tmp_path):
    picture = tmp_path / "a.svg"
    tiny = ("--ranks", "2", "--tokens", "2,5", "--hidden", "32", "--topk", "1", "--experts", "2", "--rounds", "1")
    shown = CliRunner().invoke(
        app, ["bench", "moe", *tiny, "--no-verify", "--baseline", "gloo", "--json", "--plot", str(picture)]
    )
    assert shown.exit_code == 0, shown.output
    rows = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [(row["tokens"], row["impl"]) for row in rows] == [
        (2, "raynixl"), (2, "gloo"), (5, "raynixl"), (5, "gloo"),
    ]  # fmt: skip
    assert not any(row["verified"] for row in rows)
    assert "<svg" in picture.read_text()
    plot_moe(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert np.isfinite([row["both_ms"] for row in rows]).all()
