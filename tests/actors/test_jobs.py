"""Jobs and clusters never see each other, and leave nothing behind however they end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import ray
from actor_tools import Holder, family, gcs_server, get, run_driver, start_driver, store_keys
from agent_tools import eventually

import raynixl as rx

pytestmark = [pytest.mark.pure, pytest.mark.ray, pytest.mark.timeout(180)]
Make = Callable[..., Any]

# argv: address, fill; says what it has, waits for a line, says what it sees, waits for another, ends
_DRIVER = """
import json, os, sys
import ray
import raynixl as rx
from actor_tools import INIT, Holder, get

address, fill = sys.argv[1], int(sys.argv[2])
own = INIT if address == "local" else {"log_to_driver": False, "logging_level": "ERROR"}
ray.init(address=address, **own)
options = {"name": "same", "namespace": f"jobs-{fill}"}
handle = Holder.options(**options).remote(4096, fill=fill)
name, incarnation, pid = get(handle.who.remote())

def say(**what):
    print(json.dumps(what), flush=True)
    sys.stdin.readline()

def look():
    seen = rx.agent().empty(4096)
    rx.agent().read(rx.agent().peer("same")["memory"], seen).wait(timeout=20.0)
    return seen.array().tolist()

say(job=ray.get_runtime_context().get_job_id(), pid=pid, driver=rx.agent().name)
say(bytes=sorted(set(look())), names=sorted(one.name for one in rx.agent().directory.list()),
    secret=rx.agent().directory.secret.hex())
"""


@contextlib.contextmanager
def _driver(*arguments: str, code: str = _DRIVER) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A driver that has said its first word; whatever becomes of it, it and its processes are gone at the end."""
    process = start_driver(code, *arguments)
    try:
        yield process, _hear(process)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            _kill_all(family(process.pid))
        process.communicate(timeout=20)


def _hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        assert process.stderr is not None
        raise AssertionError(process.stderr.read())
    heard: dict[str, Any] = json.loads(line)
    return heard


def _go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def _kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _job_keys(job: str) -> list[str]:
    return [key for key in store_keys() if f"/{job}/" in key]


def _end(process: subprocess.Popen[str]) -> None:
    """Let a driver end by itself; it has nothing more to say."""
    _go_on(process)
    out, text = process.communicate(timeout=60)
    assert (process.returncode, out, text) == (0, "", "")


def test_two_jobs_of_one_cluster_never_see_each_other_and_leave_no_key(cluster: str) -> None:
    from raynixl.actors import list_agents

    with _driver(cluster, "1") as (one, first), _driver(cluster, "2") as (two, second):
        for process in (one, two):
            _go_on(process)
        seen = [_hear(process) for process in (one, two)]
        assert [each["bytes"] for each in seen] == [[1], [2]]
        assert [each["names"] for each in seen] == [["driver", "same"]] * 2
        assert seen[0]["secret"] != seen[1]["secret"]
        assert first["job"] != second["job"]
        both = [record for record in list_agents() if record.labels["job_id"] in (first["job"], second["job"])]
        assert sorted(record.name for record in both) == ["driver", "driver", "same", "same"]
        _end(one)
        _end(two)
    assert _job_keys(first["job"]) == _job_keys(second["job"]) == []


def test_a_killed_driver_is_swept_up_after_by_the_next(cluster: str) -> None:
    with _driver(cluster, "5") as (one, first):
        assert _job_keys(first["job"])
        os.kill(one.pid, signal.SIGKILL)
        eventually(lambda: not psutil.pid_exists(first["pid"]), "Ray ends the dead job's actor")
        eventually(lambda: _job_state(first["job"]), "Ray knows that the job is over")
    with _driver(cluster, "6") as (two, second):
        assert _job_keys(first["job"]) == []
        assert _job_keys(second["job"])
        _go_on(two)
        _hear(two)
        _end(two)


def _job_state(job: str) -> bool:
    return any(one["JobID"] == job and one["IsDead"] for one in ray._private.state.jobs())


def test_clusters_never_see_each_other_and_one_killed_as_a_whole_leaves_nothing_and_starts_anew() -> None:
    with _driver("local", "3") as (one, _), _driver("local", "4") as (two, said):
        for process in (one, two):
            _go_on(process)
        seen = [_hear(process) for process in (one, two)]
        assert [each["bytes"] for each in seen] == [[3], [4]]
        assert [each["names"] for each in seen] == [["driver", "same"]] * 2
        _end(one)
        everybody = family(two.pid)
        assert said["pid"] in {process.pid for process in everybody}
        _kill_all(everybody)
        eventually(lambda: not any(_is_running(process) for process in everybody), "all are dead")
    assert not [name for name in os.listdir("/dev/shm") if "raynixl" in name]
    with _driver("local", "4") as (two, _):
        _go_on(two)
        assert _hear(two)["bytes"] == [4]
        _end(two)


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


_DETACHED = """
import sys
import ray
import raynixl as rx
from actor_tools import Holder, get

ray.init(address=sys.argv[1], namespace="lasting", log_to_driver=False, logging_level="ERROR")
lasting = Holder.options(name="lasting", lifetime="detached").remote(4096, fill=1)
passing = Holder.options(name="passing").remote(4096, fill=2)
get([lasting.who.remote(), passing.who.remote()])
rx.agent()
print(ray.get_runtime_context().get_job_id())
"""

_NEXT = """
import sys
import ray
import raynixl as rx

ray.init(address=sys.argv[1], namespace="lasting", log_to_driver=False, logging_level="ERROR")
lasting = ray.get_actor("lasting")
for attempt in (
    lambda: rx.agent().peer("lasting"), lambda: rx.attach(lasting),
    lambda: rx.WeightSync("weights", sources=[lasting], targets=["driver"]),
):
    try:
        attempt()
        print("found")
    except rx.RaynixlError as exc:
        print(type(exc).__name__)
print(ray.get(lasting.total.remote(), timeout=30))
if len(sys.argv) > 2:
    ray.kill(lasting)
"""


def test_a_detached_actor_outlives_its_driver_and_stays_its_jobs(cluster: str) -> None:
    done = run_driver(_DETACHED, cluster)
    assert (done.returncode, done.stderr) == (0, "")
    job = done.stdout.strip()
    assert sorted(key.split(f"/{job}/")[1] for key in _job_keys(job)) == ["agents/lasting", "secret"]
    done = run_driver(_NEXT, cluster, "kill it")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["PeerUnknown", "ConfigError", "PeerUnknown", "4096"]
    eventually(lambda: run_driver(_NEXT, cluster).returncode != 0, "the detached actor is gone")
    run_driver(
        "import ray, sys, raynixl as rx; ray.init(address=sys.argv[1], log_to_driver=False); rx.agent()", cluster
    )
    assert _job_keys(job) == []


_SHUTDOWN = """
import sys, threading
import ray
import raynixl as rx
from actor_tools import store_keys

def ours():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("raynixl")]

for _ in range(2):
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    agent = rx.agent()
    assert agent is rx.agent() and agent.name == "driver" and ours()
    print(ray.get_runtime_context().get_job_id(), flush=True)
    ray.shutdown()
    assert agent.is_closed and not ours(), ours()
    try:
        rx.agent()
    except rx.ConfigError as exc:
        assert "ray.init" in str(exc)
"""


def test_ray_shutdown_ends_the_drivers_agent_and_ray_init_allows_another(cluster: str) -> None:
    done = run_driver(_SHUTDOWN, cluster)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.split()
    assert first != second
    assert _job_keys(first) == _job_keys(second) == []


def test_a_stopped_gcs_stops_no_transfer_between_connected_peers(make: Make) -> None:
    get(make(Holder, fill=8, options={"name": "connected"}).who.remote())
    mine = rx.agent().empty(1 << 20)
    peer = rx.agent().peer("connected")
    rx.agent().read(peer["memory"], mine).wait(timeout=10.0)
    server = gcs_server(os.getpid())
    server.send_signal(signal.SIGSTOP)
    try:
        for _ in range(20):
            mine.array()[:] = 0
            rx.agent().read(rx.agent().peer("connected")["memory"], mine, notify=b"read").wait(timeout=10.0)
            assert set(mine.array().tolist()) == {8}
        with pytest.raises(rx.BackendUnavailable, match="the GCS does not answer"):
            rx.agent().peer("somebody new")
    finally:
        server.send_signal(signal.SIGCONT)
    rx.agent().deregister(mine)
    with pytest.raises(rx.PeerUnknown):
        rx.agent().peer("somebody new")
