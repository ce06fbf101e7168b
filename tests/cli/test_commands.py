"""The command line: its contract on standard output, its errors, and what it leaves behind (nothing)."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import typer
from typer.testing import CliRunner

import raynixl
from raynixl.cli import app
from raynixl.cli.doctor import examine
from raynixl.cli.screen import report

RUN = [sys.executable, "-m", "raynixl"]
BENCH = ("bench", "transfer", "--sizes", "8,4K", "--rounds", "1", "--baseline", "memcpy")


def _invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def _run(*arguments, timeout=60):
    return subprocess.run([*RUN, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


def _wait(is_so, what, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.parametrize("argument", ["version", "--version"])
def test_version_is_the_packages(argument):
    assert _invoke(argument).stdout.strip() == raynixl.__version__


def test_without_a_command_it_helps():
    shown = _invoke()
    assert all(word in shown.output for word in ("doctor", "agents", "bench", "version"))


def test_json_is_one_object_a_line_and_nothing_else():
    done = _run(*BENCH, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["impl"], row["block_nbytes"]) for row in rows] == [
        ("raynixl", 8), ("memcpy", 8), ("raynixl", 4096), ("memcpy", 4096),
    ]  # fmt: skip
    assert all(row["bench"] == "transfer" and row["verified"] is True for row in rows)


def test_the_installed_script_and_the_module_are_the_same():
    script = os.path.join(os.path.dirname(sys.executable), "raynixl")
    done = subprocess.run([script, "version"], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == _run("version").stdout


def test_without_json_a_table_and_a_picture_come(tmp_path):
    shown = _invoke(*BENCH, "--plot", str(tmp_path / "a.png"))
    assert shown.exit_code == 0
    assert "memcpy" in shown.stdout
    assert "4 KiB" in shown.stdout
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_peers_are_one_row():
    shown = _invoke("bench", "peers", "--peers", "2", "--processes", "2", "--json")
    (line,) = shown.stdout.splitlines()
    row = json.loads(line)
    assert (row["bench"], row["peers"], row["verified"]) == ("peers", 2, True)


def test_unchecked_bytes_are_neither_right_nor_wrong(capsys):
    rows = [{"impl": "ucx_perftest", "verified": None}]
    assert report(rows, "a", is_json=False) == rows
    assert "-" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        report([*rows, {"impl": "raynixl", "verified": False}], "a", is_json=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sizes", "4Q"), "not a size"),
        (("--backend", "pigeon"), "no backend 'pigeon'"),
        (("--baseline", "hope"), "no baseline 'hope'"),
        (("--ucx", "TLS"), "'TLS' is no option of UCX"),
        (("--sizes", "1000000G"), "are needed"),
    ],
)
def test_errors_are_two_lines_and_exit_code_1(arguments, message):
    done = _run("bench", "transfer", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert message in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_unusable_options_are_refused_by_the_parser():
    assert _run("bench", "transfer", "--op", "steal").returncode == 2


def _start_bench():
    command = [*RUN, "bench", "transfer", "--sizes", "1M", "--rounds", "1000", "--json"]
    heard = signal.signal(signal.SIGINT, signal.SIG_DFL)  # where the tests run in the background it may be ignored
    try:
        bench = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, heard)
    seen = psutil.Process(bench.pid)
    _wait(lambda: seen.children(recursive=True), "the target did not start")
    time.sleep(1.5)
    return bench, seen.children(recursive=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, -15)])
def test_an_ended_bench_leaves_nothing_running(number, code):
    bench, children = _start_bench()
    bench.send_signal(number)
    try:
        _, text = bench.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        bench.kill()
        pytest.fail(f"the bench goes on: {bench.communicate()[1]}")
    assert bench.returncode == code
    assert "Traceback" not in text
    _wait(lambda: not any(child.is_running() for child in children), "the target lives on")


def test_a_killed_target_is_a_typed_error():
    bench, children = _start_bench()
    children[0].send_signal(signal.SIGKILL)
    out, text = bench.communicate(timeout=20)
    assert (bench.returncode, out) == (1, "")
    assert text.startswith("error:")
    assert "Traceback" not in text


def test_doctor_finds_every_backend_working_here():
    shown = _invoke("doctor", "--json")
    assert shown.exit_code == 0
    (line,) = shown.stdout.splitlines()
    seen = json.loads(line)
    assert seen["works"] is True
    verdicts = {one["name"]: one["verdict"] for one in seen["findings"] if one["area"] == "backend"}
    for name in ("loopback, arenas", "loopback, plain memory", "shm, arenas"):
        assert verdicts[name] == "works"
    assert {"versions", "memory", "huge pages", "core", "ucx", "process_vm"} <= {
        one["area"] for one in seen["findings"]
    }


def test_doctor_says_that_the_core_is_switched_off(monkeypatch):
    monkeypatch.setenv("RAYNIXL_NATIVE", "0")
    core = next(one for one in examine() if one.area == "core")
    assert core.verdict == "slow"
    assert "RAYNIXL_NATIVE" in core.hint


def test_doctor_fails_where_nothing_works(monkeypatch):
    monkeypatch.setattr("raynixl.backends.table.names", lambda: ["pigeon"])
    shown = _invoke("doctor")
    assert shown.exit_code == 1
    assert "pigeon" in shown.stdout


def test_agents_without_a_cluster_says_what_to_do():
    pytest.importorskip("ray")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_TMPDIR"] = "/nonexistent-raynixl"  # clusters of other tests on this host are not looked for
    done = subprocess.run([*RUN, "agents"], capture_output=True, text=True, timeout=60, check=False, env=environment)
    if done.returncode == 0:
        pytest.skip("a cluster runs on this host")
    assert done.returncode == 1
    assert "no Ray cluster answers" in done.stderr
    assert "ray start --head" in done.stderr
    assert "Traceback" not in done.stderr
