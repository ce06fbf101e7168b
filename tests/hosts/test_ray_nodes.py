"""Ray's nodes on the hosts: work runs on each of them, programs come and go, and nothing of a cluster is left."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts_tools import PATIENCE
from ray_hosts import RayHosts

pytestmark = [pytest.mark.pure, pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("_hosts_allowed")]


def _spaces() -> list[str]:
    """The process namespaces of the processes that this machine can see."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            found.append(os.readlink(f"/proc/{name}/ns/pid"))
        except OSError:
            continue
    return found


def test_work_runs_on_every_node_until_all_ends_with_the_hosts(nothing_left: Callable[[], list[str]]) -> None:
    with RayHosts() as cluster:
        spaces = {os.readlink(f"/proc/{host.pid}/ns/pid") for host in cluster.bed}
        told = [line.split() for line in cluster.drive("tasks").splitlines()]
        assert [(name, address) for _, name, address, _ in told] == [(host.name, host.address) for host in cluster.bed]
        assert len({node for node, *_ in told}) == 2
        assert sum(space in spaces for space in _spaces()) > 10
        assert not Path("/dev/shm/ray").exists()
        check_that_programs_come_and_go(cluster)
    assert not spaces & set(_spaces())


def check_that_programs_come_and_go(cluster: RayHosts) -> None:
    """Programs are killed, time out and fail, and their cluster goes on."""
    program = cluster.start(["sleep", "60"])
    program.kill()
    program.communicate(timeout=PATIENCE)
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.run(["sleep", "60"], timeout=0.1)
    assert cluster.run(["sh", "-c", "echo out; exit 3"]).returncode == 3
    with pytest.raises(AssertionError, match="ended with"):
        cluster.drive("none")
    assert cluster.drive("tasks").count("\n") == 2
