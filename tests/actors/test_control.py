"""Control goes agent to agent: busy actors answer, and actors of others get agents."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import ray
from actor_tools import AsyncHolder, Holder, get, kill_process
from agent_tools import eventually

import raynixl as rx

pytestmark = pytest.mark.ray
Make = Callable[..., Any]
FOR_EVER = 600.0


def _echo(payload: bytes) -> Any:
    """Have the actor's agent answer requests with what it was asked; runs in the actor."""
    rx.agent().serve("echo", lambda _peer, asked: asked + payload)


def _forward(agent_name: str) -> bytes:
    return rx.agent().ask(agent_name, "echo", b"from an actor ", timeout=10.0).wait()


@pytest.mark.parametrize("kind", [Holder, AsyncHolder], ids=["method in pure Python", "event loop blocked"])
def test_a_busy_actor_answers_reads_writes_notifications_and_requests(make: Make, kind: Any) -> None:
    handle = make(kind, options={"name": "busy", "max_concurrency": 1})
    get(handle.call.remote(_echo, b"ed"))
    _, _, pid = get(handle.who.remote())
    before = _cpu_seconds(pid)
    running = (handle.block if kind is AsyncHolder else handle.spin).remote(FOR_EVER)
    eventually(lambda: _cpu_seconds(pid) > before + 0.3, "the actor is busy")
    agent, peer = rx.agent(), rx.agent().peer("busy")
    mine = agent.empty(1 << 20)
    mine.array()[:] = 5
    agent.write(mine, peer["memory"], notify=b"written").wait(timeout=20.0)
    mine.array()[:] = 0
    agent.read(peer["memory"], mine).wait(timeout=20.0)
    assert bytes(mine.array()) == b"\x05" * (1 << 20)
    assert peer.ask("echo", b"ask", timeout=20.0).wait() == b"asked"
    with pytest.raises(rx.RegionUnknown):
        peer["no such region"]
    done, _ = ray.wait([running], timeout=0)
    assert not done
    agent.deregister(mine)


def _cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def test_actors_ask_actors_while_both_have_methods_waiting(make: Make) -> None:
    asker = make(Holder, options={"name": "asker", "max_concurrency": 2})
    asked = make(Holder, options={"name": "asked"})
    get(asked.call.remote(_echo, b"and back"))
    asked.spin.remote(FOR_EVER)
    assert get(asker.call.remote(_forward, "asked")) == b"from an actor and back"


def test_an_agent_is_awaited_in_an_async_actor(make: Make) -> None:
    @ray.remote(num_cpus=0)
    @rx.worker
    class Reader:
        async def read(self, name: str) -> int:
            seen = rx.agent().empty(1 << 20)
            await rx.agent().read(rx.agent().peer(name, timeout=20.0)["memory"], seen)
            return int(seen.array().sum())

    source = make(Holder, fill=1, options={"name": "source"})
    get(source.who.remote())
    reader = make(Reader)
    assert get([reader.read.remote("source") for _ in range(3)]) == [1 << 20] * 3


@ray.remote(num_cpus=0)
class Foreign:
    """An actor that somebody else wrote."""

    def name(self) -> str:
        return rx.agent().name

    def register(self) -> None:
        self.region = rx.agent().empty(4096, name="memory")
        self.region.array()[:] = 9

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@ray.remote(num_cpus=0)
class ForeignAsync:
    """An async actor that somebody else wrote."""

    async def name(self) -> str:
        await asyncio.sleep(0)
        return rx.agent().name


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Foreign, {}), (ForeignAsync, {}), (Foreign, {"max_concurrency": 4})],
    ids=["plain", "async", "threaded"],
)
def test_attach_gives_an_agent_to_an_actor_of_others_once(make: Make, kind: Any, options: dict[str, Any]) -> None:
    handle = make(kind, options=options)
    name = rx.attach(handle, name="attached")
    assert name == "attached"
    incarnation = rx.agent().peer("attached").connect()
    assert rx.attach(handle) == "attached"
    assert rx.agent().peer("attached").connect() == incarnation
    assert get(handle.name.remote()) == "attached"


def test_an_attached_actor_is_read_like_any_other(make: Make) -> None:
    handle = make(Foreign)
    name = rx.attach(handle)
    assert name == f"Foreign-{handle._actor_id.hex()[:12]}"
    get(handle.register.remote())
    seen = rx.agent().empty(4096)
    rx.agent().read(rx.agent().peer(name)["memory"], seen).wait(timeout=10.0)
    assert set(seen.array().tolist()) == {9}
    rx.agent().deregister(seen)


def test_attach_to_a_busy_actor_ends_by_its_deadline(make: Make) -> None:
    handle = make(Foreign)
    handle.sleep.remote(FOR_EVER)
    with pytest.raises(rx.TransferTimeout, match=r"did not start an agent within 0\.5 s"):
        rx.attach(handle, timeout=0.5)


def test_attach_to_the_dead_says_so(make: Make) -> None:
    handle = make(Foreign)
    pid = get(handle.__ray_call__.remote(lambda _self: os.getpid()))
    kill_process(pid, signal.SIGKILL)
    with pytest.raises(rx.PeerLost, match="is dead"):
        rx.attach(handle)


@pytest.mark.parametrize("handle", [None, "name", Foreign], ids=["None", "name", "class"])
def test_attach_takes_handles_only(cluster: str, handle: Any) -> None:
    with pytest.raises(rx.ConfigError, match="not an actor handle"):
        rx.attach(handle)


def test_attach_under_a_name_in_use_is_refused_and_harms_nobody(make: Make) -> None:
    get(make(Holder, options={"name": "mine"}).who.remote())
    handle = make(Foreign)
    with pytest.raises(rx.ConfigError, match="'mine' is taken"):
        rx.attach(handle, name="mine")
    assert rx.attach(handle, name="yours") == "yours"


def test_a_handle_without_agent_is_named_with_the_remedy(make: Make) -> None:
    with pytest.raises(rx.PeerUnknown, match=r"@rx.worker.*rx.attach"):
        rx.WeightSync("weights", sources=[make(Foreign)], targets=["driver"])
