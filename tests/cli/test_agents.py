"""`raynixl agents` against a real cluster: everybody is listed, as a table and as JSON."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.pure

ray = pytest.importorskip("ray")

_CLUSTER = """
import subprocess, sys
import ray
import raynixl as rx

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)

@ray.remote(num_cpus=0)
@rx.worker
class Rollout:
    def __init__(self):
        self.region = rx.agent().empty(4096, name="policy")

    def pid(self):
        import os
        return os.getpid()

rollout = Rollout.options(name="rollout-0").remote()
pid = ray.get(rollout.pid.remote(), timeout=60)
address = ray.get_runtime_context().gcs_address
print(pid)
for more in ((), ("--json",)):
    command = [sys.executable, "-m", "raynixl", "agents", "--address", address, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    print(done.stdout if done.returncode == 0 else done.stderr)
ray.shutdown()
"""


@pytest.mark.ray
def test_agents_of_a_running_cluster_are_listed():
    done = subprocess.run([sys.executable, "-c", _CLUSTER], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    table = done.stdout.split("{")[0]
    assert all(word in table for word in ("rollout-0", "Rollout", "policy", lines[0]))
    rows = {row["name"]: row for row in map(json.loads, (line for line in lines if line.startswith("{")))}
    assert rows["rollout-0"]["pid"] == int(lines[0])
    assert rows["rollout-0"]["regions"] == {"policy": 4096}
    assert rows["rollout-0"]["labels"]["actor_class"] == "Rollout"
    assert 0 < rows["rollout-0"]["lease_seconds"] <= 30
