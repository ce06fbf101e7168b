"""A whole host of a Ray cluster is lost: its ranks are left out, and the others go on."""

from __future__ import annotations

import sys

import pytest
from ray_hosts import DRIVERS, PATIENCE, RayHosts

pytestmark = [pytest.mark.pure, pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.mark.usefixtures("_hosts_allowed")
def test_weights_are_synced_until_a_whole_host_is_gone_and_then_without_it() -> None:
    with RayHosts(cpus=2, RAYNIXL_UCX="TLS=tcp", RAYNIXL_HEARTBEAT_TIMEOUT="2") as cluster:
        driver = cluster.start([sys.executable, str(DRIVERS / "weights.py")])
        assert driver.stdin is not None
        assert driver.stdout is not None
        try:
            if "pull the plug\n" in driver.stdout:  # Ray may say something of a killed worker before
                cluster.bed.hosts[1].close()
                driver.stdin.write("it is pulled\n")
            _, errors = driver.communicate(timeout=PATIENCE)
        finally:
            driver.kill()
            driver.communicate()
        assert driver.returncode == 0, errors
