"""The benchmarks themselves, on tiny sizes: rows keep the contract, bytes are right, nothing is left behind."""

import gc
import os
import signal
import threading

import psutil
import pytest

from raynixl.bench.footprint import run_agent
from raynixl.bench.notify import NotifySpec, run_notify
from raynixl.bench.plot import plot_transfer
from raynixl.bench.process import TargetProcess
from raynixl.bench.spec import TransferSpec
from raynixl.bench.timing import measure
from raynixl.bench.transfer import TransferBench, run_transfer
from raynixl.config import AgentConfig
from raynixl.errors import ConfigError, PeerLost

CONTRACT = {
    "bench": str, "impl": str, "backend": str, "op": str, "memory": str, "block_nbytes": int, "blocks": int,
    "pattern": str, "gbps": float, "p50_us": float, "p99_us": float, "prepare_us_per_block": float,
    "post_us_per_block": float, "verified": bool, "lane": str, "busy": bool,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _leaves_no_child_behind():
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.parametrize("backend", ["shm", "loopback"])
@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("memory", ["arena", "user"])
@pytest.mark.parametrize(("blocks", "is_random"), [(1, False), (40, True)])
def test_transfer_rows_keep_the_contract(backend, op, memory, blocks, is_random):
    names = ("memcpy",) if backend == "loopback" else ("memcpy", "process_vm")
    spec = TransferSpec(
        (8, 4096), backend=backend, op=op, memory=memory, blocks=blocks, is_random=is_random, threads=2, rounds=1,
        baselines=names,
    )  # fmt: skip
    rows = list(run_transfer(spec))
    assert [(row["block_nbytes"], row["impl"]) for row in rows] == [
        (size, impl) for size in (8, 4096) for impl in ("raynixl", *names)
    ]
    for row in rows:
        assert {name: type(value) for name, value in row.items()} == CONTRACT
        assert row["verified"] is True
        assert 0 < row["p50_us"] <= row["p99_us"]
        assert row["gbps"] == pytest.approx(row["block_nbytes"] * blocks / row["p50_us"] / 1e3, rel=1e-3)


@pytest.mark.skipif("ucx" not in AgentConfig().backends, reason="ucxx is not installed")
@pytest.mark.parametrize("op", ["read", "write"])
def test_rows_over_ucx_tell_the_lane_that_the_options_leave(op):
    (row,) = run_transfer(
        TransferSpec((4096,), backend="ucx", op=op, memory="huge", blocks=40, is_random=True, rounds=1,
                     ucx={"TLS": "tcp"})
    )  # fmt: skip
    assert {name: type(value) for name, value in row.items()} == CONTRACT
    assert row["verified"] is True
    assert row["lane"].startswith("tcp")


def test_a_busy_interpreter_is_a_row_of_its_own():
    rows = list(run_transfer(TransferSpec((8, 4096), rounds=1, is_busy=True)))
    assert [(row["block_nbytes"], row["busy"]) for row in rows] == [(8, False), (8, True), (4096, False), (4096, True)]
    assert all(row["verified"] is True for row in rows)
    assert not [one for one in threading.enumerate() if one.name == "bench-busy"]


def test_repeated_benches_leave_no_descriptor():
    """Closing an agent used to leave the descriptors of links that were closed a moment before."""
    list(run_transfer(TransferSpec((8,), rounds=1)))
    gc.collect()  # mappings hold a descriptor until their last view is gone
    before = psutil.Process().num_fds()
    for _ in range(5):
        list(run_transfer(TransferSpec((8,), rounds=1, baselines=("memcpy",))))
    gc.collect()
    assert psutil.Process().num_fds() <= before


def test_verification_notices_bytes_that_do_not_arrive(monkeypatch):
    class Idle:
        impl, prepare_seconds = "idle", 0.0

        def sample(self, count):
            return [1] * count

    monkeypatch.setattr(TransferBench, "_prepare", lambda *_: Idle())
    for op in ("read", "write"):
        rows = list(run_transfer(TransferSpec((4096,), op=op, rounds=1)))
        assert [row["verified"] for row in rows] == [False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"baselines": ("memcpi",)}, "no baseline"),
        ({"baselines": ("process_vm",), "backend": "loopback"}, "between processes"),
        ({"sizes": (1 << 50,)}, "are needed"),
    ],
)
def test_what_cannot_be_measured_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        list(run_transfer(TransferSpec(**{"sizes": (8,), **fields})))


@pytest.mark.parametrize("baselines", [(), ("memcpy", "process_vm")])
def test_a_killed_target_ends_the_bench_with_its_error(baselines):
    spec = TransferSpec((1 << 20,), rounds=100, baselines=baselines)
    bench = TransferBench(spec)
    threading.Timer(1.0, os.kill, (bench._pid, signal.SIGKILL)).start()
    with bench, pytest.raises(PeerLost):
        list(bench.measure(1 << 20, lambda: None))


def test_runners_are_measured_in_turn_and_in_both_orders():
    order = []

    class Noted:
        prepare_seconds = 0.0

        def __init__(self, impl):
            self.impl = impl

        def sample(self, count):
            order.append(self.impl)
            return [10**9] * count

    times = measure([Noted("a"), Noted("b")], 3, lambda: None)
    assert order[4:] == ["a", "b", "b", "a", "a", "b"]
    assert all(len(each) >= 3 for each in times)


def test_notifications_come_back():
    rows = list(run_notify(NotifySpec(trips=20, pause_ms=0.1, baselines=("socket",))))
    assert [(row["impl"], row["pause_ms"] > 0) for row in rows] == [
        ("raynixl", False), ("socket", False), ("raynixl", True), ("socket", True),
    ]  # fmt: skip
    assert all(row["verified"] and row["trips"] == 20 and 0 < row["p50_us"] <= row["p99_us"] for row in rows)


def test_an_agent_is_cheap():
    (row,) = run_agent(peers=3, idle_seconds=1.0, records=0)
    assert row["create_ms"] < 50
    assert row["first_transfer_ms"] < 100  # 20 is promised, on a host that does nothing else
    assert row["idle_cpu_percent"] < 5  # likewise, 1
    assert row["rss_mib"] < 60
    assert row["find_ms"] is None


@pytest.mark.ray
def test_a_peer_is_found_among_many_in_the_gcs():
    pytest.importorskip("ray")
    (row,) = run_agent(peers=1, idle_seconds=0.1, records=50)
    assert 0 < row["find_ms"] < 20


def test_a_target_reports_errors_of_its_side_and_lives_on():
    with TargetProcess() as target:
        target.ask("agent", name="far", config={"backends": ("shm",)})
        with pytest.raises(ConfigError, match="not usable"):
            target.ask("region", name="\n", nbytes=8, memory="arena")
        assert target.ask("word")["pid"] == target.pid


def test_a_dead_target_is_reported_by_every_later_question():
    with TargetProcess() as target:
        os.kill(target.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(PeerLost, match="killed by signal 9"):
                target.ask("word")


def test_a_picture_is_written(tmp_path):
    rows = list(run_transfer(TransferSpec((8, 4096), rounds=1, baselines=("memcpy",))))
    plot_transfer(rows, tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ConfigError, match="cannot be written"):
        plot_transfer(rows, tmp_path / "a.nothing")
