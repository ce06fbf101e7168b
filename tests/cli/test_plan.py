"""`raynixl plan`: figures of public models that can be checked by hand, and errors that say what to give instead."""

import json

import pytest
from typer.testing import CliRunner

from raynixl.cli import app
from raynixl.weights.catalogue import parameters
from raynixl.weights.estimate import Site, loads, memory, over_send, scenarios
from raynixl.weights.meshes import source_shards, target_shards
from raynixl.weights.plan import plan
from raynixl.weights.simulator import simulate

pytestmark = pytest.mark.pure

LLAMA_NBYTES = 16_060_522_496
SMALL = ("plan", "qwen2.5-0.5b", "--source", "fsdp=8", "--target", "tp=2,replicas=4")


def _invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def _row(*arguments):
    shown = _invoke(*arguments, "--json")
    assert shown.exit_code == 0, shown.output
    (line,) = shown.stdout.splitlines()
    return json.loads(line)


def _decided(model, source, target):
    found = parameters(model)
    return plan(source_shards(found, source), target_shards(found, target))


def test_json_is_one_line_with_everything_in_it():
    row = _row(*SMALL)
    assert (row["model"], row["tensors"], row["sources"], row["targets"]) == ("qwen2.5-0.5b", 290, 8, 8)
    assert (row["replicas"], row["images"], row["over_send_nbytes"]) == (4, 2, 0)
    assert [way["way"] for way in row["predicted"]] == ["lower bound", "direct", "chain", "tree", "swarm"]
    assert row["planning_seconds"] > 0
    assert {"source", "target"} == set(row["memory"])


def test_whole_replicas_of_llama_cost_what_one_works_out_by_hand():
    row = _row(
        "plan", "llama-3.1-8b", "--source", "fsdp=8", "--target", "replicas=32", "--gpus-per-host", "1",
        "--link-gbps", "80",
    )  # fmt: skip
    loads = {load["link"]: load for load in row["links"]}
    assert loads["target, in"]["total_nbytes"] == 32 * LLAMA_NBYTES
    assert loads["source, out, direct"]["total_nbytes"] == 32 * LLAMA_NBYTES
    assert loads["source, out, relayed"]["total_nbytes"] == LLAMA_NBYTES
    assert loads["source, out, relayed"]["links"] == 8
    assert loads["target, out to others, relayed"]["total_nbytes"] == 31 * LLAMA_NBYTES
    assert loads["inside hosts, relayed"]["total_nbytes"] == 0
    assert row["memory"]["target"] == {"weights": LLAMA_NBYTES, "peak": 2 * LLAMA_NBYTES}
    seconds = {way["way"]: way["seconds"] for way in row["predicted"]}
    once = LLAMA_NBYTES / 10e9
    assert seconds["lower bound"] == pytest.approx(once, rel=0.01)
    assert seconds["direct"] == pytest.approx(4 * once, rel=0.01)  # 32 copies through 8 links
    assert once <= seconds["chain"] < 1.1 * once
    assert 2 * once <= seconds["tree"] < 2.1 * once
    assert once <= seconds["swarm"] < 1.15 * once


def test_ranks_on_one_host_bring_an_image_in_once():
    decided = _decided("qwen2.5-0.5b", "fsdp=4", "tp=2,replicas=8")
    found = {load.link: load for load in loads(decided, Site(1e9, per_host=8))}
    assert found["host, in, relayed"].links == 2
    assert found["host, in, relayed"].busiest_nbytes == sum(decided.nbytes)
    assert found["inside hosts, relayed"].total_nbytes == 6 * sum(decided.nbytes)
    assert over_send(decided) == 0


def test_alike_images_are_simulated_once_unless_hosts_share_a_link():
    decided = _decided("qwen3-30b-a3b", "fsdp=16", "tp=4,ep=8,replicas=4")
    own = scenarios(decided, Site(50e9))
    assert [(len(one.images), len(one.ranks)) for one in own] == [(1, 4)]
    (shared,) = scenarios(decided, Site(50e9, host=100e9))
    assert (len(shared.images), len(shared.ranks), len(shared.nodes)) == (8, 32, 4)
    alone, together = (simulate(one).seconds for one in (own[0], shared))
    assert alone * 3.5 < together < alone * 6  # eight links of 50 GB/s became one of 100


def test_memory_is_that_of_the_fullest_rank():
    found = parameters("qwen3-30b-a3b")
    ranks = target_shards(found, "tp=2,ep=4")
    sizes = [shards.layout.nbytes for shards in ranks]
    most = memory(ranks)
    assert most.weights <= max(sizes) < most.weights * 1.001  # but for alignment
    assert most.peak == 2 * most.weights


def test_a_table_and_a_picture_come(tmp_path):
    shown = _invoke(*SMALL, "--plot", str(tmp_path / "a.png"))
    assert shown.exit_code == 0, shown.output
    assert "from 8 sources (fsdp=8) to 8 targets (tp=2,replicas=4)" in shown.stdout
    assert "over-send 0 bytes" in shown.stdout
    assert "swarm" in shown.stdout
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_hosts_may_be_counted_instead_of_their_gpus():
    rows = [_row(*SMALL, *more) for more in (("--hosts", "2"), ("--gpus-per-host", "4"))]
    assert rows[0]["links"] == rows[1]["links"]
    assert next(load for load in rows[0]["links"] if load["link"] == "host, in, relayed")["links"] == 2


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("llama-3.1-8c", "fsdp=8", "tp=8"), "there is no model 'llama-3.1-8c'", "did you mean llama-3.1-8b?"),
        (
            ("llama-3.1-8b", "fsdp:8", "tp=8"),
            "'fsdp:8' is no size of a mesh",
            "give some of replicas, pp, tp, ep, fsdp",
        ),
        (("llama-3.1-8b", "fsdp=8", "tp=5"), "tp=5 does not divide model.layers.0.self_attn.q_proj.weight", "choose"),
        (("llama-3.1-8b", "fsdp=8", "tp=8", "--fp8"), "is not published with FP8", "leave fp8 out"),
        (("llama-3.1-8b", "fsdp=8", "tp=8", "--plot", "a.docx"), "the picture cannot be written", ".png"),
        (("llama-3.1-8b", "fsdp=8", "tp=8", "--chunk", "0"), "0", ""),
    ],
)
def test_errors_are_two_lines_and_exit_code_1(arguments, message, hint):
    model, source, target, *more = arguments
    shown = _invoke("plan", model, "--source", source, "--target", target, *more)
    assert shown.exit_code == 1
    assert message in shown.stderr
    assert hint in shown.stderr
    assert "Traceback" not in shown.stderr
