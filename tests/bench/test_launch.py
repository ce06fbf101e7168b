"""Targets that are started elsewhere, and the plain stream that says what the network gives."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from agent_tools import eventually
from hosts_tools import why_no_hosts

from raynixl.bench.process import TargetProcess
from raynixl.bench.spec import TransferSpec
from raynixl.bench.transfer import run_transfer
from raynixl.errors import ConfigError, PeerLost

TOOL = Path(__file__).parents[2] / "tools" / "hosts_bench.py"
STAYS = ("sh", "-c", '"$@"; exit $?', "sh")  # a launcher that stays between us and the target
needs_ucx = pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed")
pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("backend", ["shm", "loopback"])
@pytest.mark.parametrize(("blocks", "is_random"), [(1, False), (9, True)])
def test_a_plain_stream_moves_the_same_memory(op, backend, blocks, is_random):
    spec = TransferSpec(
        (4096, 100_000), backend=backend, op=op, blocks=blocks, is_random=is_random, rounds=1, baselines=("socket",)
    )
    rows = [row for row in run_transfer(spec) if row["impl"] == "socket"]
    assert [row["block_nbytes"] for row in rows] == [4096, 100_000]
    for row in rows:
        assert row["lane"] == "tcp"
        assert row["verified"] is (None if is_random else True), "it keeps the order of the stream"


@needs_ucx
@pytest.mark.parametrize("op", ["read", "write"])
def test_a_launched_target_is_reached_with_a_secret_of_this_run(op):
    spec = TransferSpec(
        (4096,), backend="ucx", op=op, rounds=1, baselines=("socket", "ucx_perftest"), ucx={"TLS": "tcp"},
        launch=STAYS,
    )  # fmt: skip
    rows = list(run_transfer(spec))
    assert [(row["impl"], row["verified"]) for row in rows] == [
        ("raynixl", True),
        ("socket", True),
        ("ucx_perftest", None),
    ]


def test_signals_reach_a_target_behind_its_launcher():
    with TargetProcess(launch=STAYS) as process:
        target = psutil.Process(process.ask("word")["pid"])
        assert target.ppid() == process.pid
        process.pause()
        eventually(lambda: target.status() == psutil.STATUS_STOPPED, "the target stops")
        process.resume()
        assert process.ask("word")["pid"] == target.pid
        target.send_signal(signal.SIGKILL)
        with pytest.raises(PeerLost, match="exit code 137"):
            process.ask("word")
    assert not target.is_running()


def test_a_target_that_does_not_end_by_itself_is_killed_with_its_launcher(monkeypatch):
    monkeypatch.setattr("raynixl.bench.process._LEAVE_SECONDS", 0.2)
    with TargetProcess(launch=("sh", "-c", "sleep 600; true", "sh")) as process:
        launcher = psutil.Process(process.pid)
        eventually(launcher.children, "the launcher has started something")
        everything = launcher.children(recursive=True)
    assert everything
    assert not psutil.wait_procs(everything, timeout=10)[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"launch": ("/no/such/command",)}, "does not start"),
        ({"launch": STAYS, "backend": "loopback"}, "inside one process"),
        ({"launch": STAYS, "baselines": ("memcpy",)}, "stay on this host"),
    ],
)
def test_what_cannot_be_launched_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        list(run_transfer(TransferSpec((8,), rounds=1, **fields)))


@needs_ucx
@pytest.mark.pure
@pytest.mark.skipif(bool(why_no_hosts()), reason=why_no_hosts() or "there are hosts")
def test_the_benchmark_between_hosts_measures_both_ways_and_leaves_nothing(tmp_path):
    mounts = Path("/proc/self/mountinfo").read_text("ascii")
    done = subprocess.run(
        [sys.executable, str(TOOL), "--sizes", "64K", "--rounds", "1", "--baselines", "socket,ucx_perftest"],
        capture_output=True, text=True, timeout=90, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[2].strip() for line in done.stdout.splitlines() if line.startswith("| 64 KiB")]
    assert rows == ["raynixl", "socket", "ucx_perftest"] * 2, done.stdout
    assert Path("/proc/self/mountinfo").read_text("ascii") == mounts
