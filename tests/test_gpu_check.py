"""tools/gpu_check.sh and its tables, without a GPU: what is asked for runs, and what fails is said and fails."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from agent_tools import eventually

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "tools" / "gpu_check.sh")
pytestmark = pytest.mark.pure


def check(*arguments: str, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", SCRIPT, "--python", sys.executable, "--out", str(out), *arguments]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(out), **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("gpu_tables", ROOT / "tools" / "gpu_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_tables", module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("performance", None)


def test_a_run_in_which_no_test_passes_fails(tmp_path: Path) -> None:
    ended = check("--only", "tests", "--tests", "tests/gpu/test_ucx.py -k no_such_test", out=tmp_path)
    assert ended.returncode == 1
    assert "no test passed" in ended.stdout
    assert "FAILED: tests" in ended.stdout


def test_every_file_runs_by_itself_and_one_that_fails_does_not_hide_the_others(tmp_path: Path) -> None:
    for name, body in {"good": "pass", "bad": "assert 1 == 2"}.items():
        text = f"import pytest\n@pytest.mark.gpu\ndef test_it():\n    {body}\n"
        (tmp_path / f"test_{name}.py").write_text(text, encoding="utf-8")
    ended = check("--only", "tests", "--tests", str(tmp_path), out=tmp_path)
    assert ended.returncode == 1
    assert f"-- {tmp_path}/test_good.py: 1 passed" in ended.stdout
    assert f"-- {tmp_path}/test_bad.py: 1 failed" in ended.stdout
    assert "assert 1 == 2" in ended.stdout


def test_a_step_that_runs_past_its_limit_fails(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(
        "import time, pytest\n@pytest.mark.gpu\ndef test_it():\n    time.sleep(30)\n", encoding="utf-8"
    )
    ended = check("--only", "tests", "--limit", "tests=20 file=1", "--tests", f"{tmp_path}/test_slow.py", out=tmp_path)
    assert ended.returncode == 1
    assert "ran past its limit of 1 s" in ended.stdout


def is_over(pid: int) -> bool:
    """Whether a process has ended, whether or not somebody has asked how."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_step_that_runs_past_its_limit_leaves_no_process_behind(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    (tmp_path / "test_slow.py").write_text(
        f"import os, pathlib, time, pytest\n@pytest.mark.gpu\ndef test_it():\n"
        f"    pathlib.Path({str(told)!r}).write_text(str(os.getpid()))\n    time.sleep(60)\n", encoding="utf-8",
    )  # fmt: skip
    ended = check("--only", "tests", "--limit", "tests=10 file=60", "--tests", f"{tmp_path}/test_slow.py", out=tmp_path)
    assert ended.returncode == 1
    assert "FAILED: tests (time limit)" in ended.stdout
    pid = int(told.read_text(encoding="utf-8"))
    eventually(lambda: is_over(pid), "it ends")


def test_what_does_not_begin_within_the_budget_has_failed(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(
        "import time, pytest\n@pytest.mark.gpu\ndef test_it():\n    time.sleep(60)\n", encoding="utf-8"
    )
    ended = check(
        "--only", "tests,bench", "--budget", "4", "--tests", f"{tmp_path}/test_slow.py", "--bench", "none", out=tmp_path
    )
    assert ended.returncode == 1
    assert "== tests (at most 4 s)" in ended.stdout
    assert "FAILED: tests (time limit) bench (not begun)" in ended.stdout


def test_what_no_gpu_has_run_goes_first_and_what_takes_longest_last(tmp_path: Path) -> None:
    names = ["cycles", "driver", "arithmetic", "moe"]
    for name in names:
        text = "import pytest\n@pytest.mark.gpu\ndef test_it():\n    pass\n"
        (tmp_path / f"test_{name}.py").write_text(text, encoding="utf-8")
    ended = check("--only", "tests", "--tests", str(tmp_path), out=tmp_path)
    assert ended.returncode == 0, ended.stdout
    told = [line for line in ended.stdout.splitlines() if line.startswith("-- ")]
    found = [Path(line.split(":")[0]).stem for line in told]
    assert found == ["test_moe", "test_arithmetic", "test_driver", "test_cycles"]


@pytest.mark.parametrize("arguments", [("--only", "nothing"), ("--what",), ("--only",)])
def test_what_there_is_not_is_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert check(*arguments, out=tmp_path).returncode == 2


@pytest.mark.skipif(shutil.which("nvidia-smi", path="/usr/bin:/bin") is not None, reason="there is a driver here")
def test_without_a_gpu_its_facts_fail_loudly(tmp_path: Path) -> None:
    ended = check("--only", "facts", out=tmp_path)
    assert ended.returncode == 1
    assert "FAILED: facts" in ended.stdout


def row(impl: str, nbytes: int, gbps: float, p50_us: float, blocks: int = 1) -> dict[str, Any]:
    return {
        "impl": impl, "block_nbytes": nbytes, "blocks": blocks, "gbps": gbps, "p50_us": p50_us, "p99_us": 2 * p50_us,
        "prepare_us_per_block": 1.0, "lane": "ipc",
    }  # fmt: skip


Measure = Callable[[list[str]], list[dict[str, Any]]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Measure], list[list[str]]]:
    """Have the commands of the tables answered by a function; returns the list of them."""

    def answer(measure: Measure) -> list[list[str]]:
        asked: list[list[str]] = []

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            asked.append(command)
            rows = measure(command)
            text = "".join(json.dumps(one) + "\n" for one in rows)
            return subprocess.CompletedProcess(command, 0 if rows else 1, text)

        monkeypatch.setattr(subprocess, "run", run)
        return asked

    return answer


def test_goals_are_judged_and_tables_are_markdown(
    tables: ModuleType, measured: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sizes = {"GPU to GPU, one large block": 64 << 20}
    asked = measured(lambda _: [row("raynixl", sizes["GPU to GPU, one large block"], 95.0, 10.0),
                                row("cudamemcpy", sizes["GPU to GPU, one large block"], 100.0, 9.0)])  # fmt: skip
    assert tables.main(["large", "--rows", str(tmp_path / "rows.jsonl")]) == 0
    told = capsys.readouterr().out
    assert "### GPU to GPU, one large block" in told
    assert "| write 64 MiB | 10.0 | 95 | 100 | 0.95 (met: >= 0.9) |" in told
    assert [command[command.index("--op") + 1] for command in asked] == ["write", "read"]
    assert len((tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()) == 4


def test_a_goal_that_is_missed_is_said_and_counts_if_asked(
    tables: ModuleType, measured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(lambda _: [row("raynixl", 8, 1.0, 13.0), row("cudamemcpy", 8, 1.0, 9.0)])
    assert tables.main(["small"]) == 0
    assert tables.main(["small", "--strict"]) == 1
    assert "13.0 (MISSED: <= 12)" in capsys.readouterr().out


def test_a_section_that_cannot_be_measured_is_said_and_fails_and_the_others_are_measured(
    tables: ModuleType, measured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(command: list[str]) -> list[dict[str, Any]]:
        if "cudamemcpy_loop" in command:
            return []
        return [row("raynixl", 4096, 90.0, 10.0, 100_000), row("cudamemcpy", 4096, 100.0, 9.0, 100_000)]

    measured(answer)
    assert tables.main(["loops", "scattered"]) == 1
    told = capsys.readouterr().out
    assert "FAILED: `raynixl bench transfer" in told
    assert "0.90 (met: >= 0.7)" in told


def test_expert_parallelism_is_told_beside_its_floor(
    tables: ModuleType, measured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"dispatch_ms": 0.05, "combine_ms": 0.04, "both_ms": 0.09, "p99_ms": 0.1, "floor_ms": 0.02, "mps": False}
    asked = measured(lambda _: [{"impl": "raynixl", **times}, {"impl": "raynixl-graph", **times, "mps": True}])
    assert tables.main(["expert"]) == 0
    told = capsys.readouterr().out
    assert "| slots, calls | 0.050 | 0.040 | 0.090 | 0.100 | 0.020 | no |" in told
    assert "| tokens, graph | 0.050 | 0.040 | 0.090 | 0.100 | 0.020 | yes |" in told
    assert "Not measured with MPS: nvidia-cuda-mps-control is not here" in told
    assert len(asked) == 3


def test_expert_parallelism_is_measured_again_by_mps_which_ends_then(
    tables: ModuleType, measured: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = dict.fromkeys(("dispatch_ms", "combine_ms", "both_ms", "p99_ms", "floor_ms"), 0.5)
    daemon = "nvidia-cuda-mps-control"
    monkeypatch.setattr(shutil, "which", lambda _: daemon)
    asked = measured(lambda _: [{"impl": "raynixl", **times, "mps": [daemon, "-d"] in asked}])
    assert tables.main(["expert"]) == 0
    told = capsys.readouterr().out
    assert told.count("| slots, calls | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | no |") == 1
    assert told.count("| slots, calls | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | yes |") == 1
    assert [command[0] == daemon for command in asked] == [False] * 3 + [True] + [False] * 3 + [True]


def test_the_weights_of_a_model_are_told_beside_bare_transfers(
    tables: ModuleType, measured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"seconds": 0.02, "gbps": 50.0, "flip_ms": 0.4}
    measured(lambda _: [{"impl": "raynixl", **row}, {"impl": "transfer", **row}])
    assert tables.main(["weights"]) == 0
    assert "| transfer | 20.0 | 50.0 | 0.40 |" in capsys.readouterr().out


def test_a_part_that_fails_leaves_what_was_measured_before(
    tables: ModuleType, measured: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = dict.fromkeys(("dispatch_ms", "combine_ms", "both_ms", "p99_ms", "floor_ms"), 0.5)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    asked = measured(lambda _: [] if len(asked) > 5 else [{"impl": "raynixl", **times, "mps": False}])
    assert tables.main(["expert"]) == 1
    told = capsys.readouterr().out
    assert "| slots, calls |" in told
    assert "FAILED: `raynixl bench moe" in told
    assert asked[-1] == ["nvidia-cuda-mps-control"]
