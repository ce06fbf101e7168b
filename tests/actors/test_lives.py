"""How actors end and begin again: records go, names pass on, peers hear of it and use the next incarnation."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import ray
from actor_tools import AsyncHolder, Holder, get, kill_process, store_keys
from agent_tools import error_of, eventually

import raynixl as rx

pytestmark = [pytest.mark.pure, pytest.mark.ray]
Make = Callable[..., Any]


def _is_listed(name: str) -> bool:
    """Whether a key of that name lies in the store; nobody looks at it, so nobody removes it."""
    return any(key.endswith(f"/agents/{name}") for key in store_keys())


def _read(name: str, *, timeout: float = 20.0) -> int:
    """Return the first byte of the actor's region, by name alone."""
    seen = rx.agent().empty(1)
    theirs = rx.agent().peer(name, timeout=timeout).region("memory", timeout=timeout)
    rx.agent().read(theirs.span(0, 1), seen).wait(timeout=timeout)
    byte = int(seen.array()[0])
    rx.agent().deregister(seen)
    return byte


def _terminate(handle: Any) -> None:
    handle.__ray_terminate__.remote()


def _exit(handle: Any) -> None:
    handle.__ray_call__.remote(lambda _self: ray.actor.exit_actor())


def _kill(handle: Any) -> None:
    ray.kill(handle, no_restart=True)


@pytest.mark.parametrize("kind", [Holder, AsyncHolder], ids=["plain", "async"])
@pytest.mark.parametrize("end", [_terminate, _exit, _kill], ids=["terminate", "exit_actor", "ray_kill"])
def test_an_actor_that_ends_leaves_no_record_and_is_lost_to_its_peers(make: Make, kind: Any, end: Any) -> None:
    handle = make(kind, options={"name": "ending"})
    get(handle.who.remote())
    assert _read("ending") == 0
    assert _is_listed("ending")
    peer = rx.agent().peer("ending")
    end(handle)
    eventually(lambda: rx.agent().lost("ending"), "the driver hears of the end")
    eventually(lambda: not _is_listed("ending"), "the record goes, with nobody looking for it")
    with pytest.raises(rx.PeerLost, match="ending"):
        peer.connect()


def test_a_killed_actors_record_goes_when_somebody_looks(make: Make) -> None:
    from raynixl.actors import list_agents

    _, _, pid = get(make(Holder, options={"name": "looked-for"}).who.remote())
    rx.agent()
    kill_process(pid, signal.SIGKILL)
    eventually(lambda: "looked-for" not in {one.name for one in list_agents()}, "it is listed no more")
    assert not _is_listed("looked-for")
    with pytest.raises(rx.PeerUnknown, match="looked-for"):
        rx.agent().peer("looked-for")


def test_a_restarted_actor_has_a_new_incarnation_under_its_name_and_is_used_with_no_call(make: Make) -> None:
    handle = make(Holder, fill=7, options={"name": "phoenix", "max_restarts": -1, "max_task_retries": -1})
    _, first, pid = get(handle.who.remote())
    old = rx.agent().peer("phoenix")["memory"]
    assert _read("phoenix") == 7
    for _ in range(2):
        kill_process(pid, signal.SIGKILL)
        _, second, pid = get(handle.who.remote())
        assert second != first
        first = second
        assert _read("phoenix") == 7
    mine = rx.agent().empty(1 << 20)
    assert isinstance(error_of(rx.agent().read(old, mine)), rx.PeerRestarted)


def test_an_unnamed_actor_keeps_its_agents_name_through_a_restart(make: Make) -> None:
    handle = make(Holder, options={"max_restarts": 1, "max_task_retries": -1})
    name, first, pid = get(handle.who.remote())
    kill_process(pid, signal.SIGKILL)
    again, second, _ = get(handle.who.remote())
    assert (name, first != second) == (again, True)


def test_a_name_passes_from_a_killed_actor_to_the_next(make: Make) -> None:
    first = make(Holder, fill=1, options={"name": "heir"})
    get(first.who.remote())
    assert _read("heir") == 1
    ray.kill(first)
    eventually(lambda: rx.agent().lost("heir"), "the first is gone")
    second = make(Holder, fill=2, options={"name": "heir-2"})
    get(second.who.remote())
    third = make(Holder, fill=3, options={"name": "heir"})
    get(third.who.remote())
    assert _read("heir") == 3


def test_a_detached_actor_is_found_within_its_job(make: Make) -> None:
    handle = make(Holder, fill=4, options={"name": "lasting", "lifetime": "detached", "namespace": "tests"})
    get(handle.who.remote())
    assert _read("lasting") == 4
    again = ray.get_actor("lasting", namespace="tests")
    assert rx.WeightSync("nothing", sources=[again], targets=["driver"]).version == 0
