"""UCX's own TCP ports: who reaches them, what they survive, and which settings would make them a trap."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import warm
from agent_tools import PATIENCE, eventually, introduce, make_agent, make_config, random_bytes
from ucx_tools import MAGIC, is_heard, ucx_ports

from raynixl import Agent, AgentClosed, BackendUnavailable
from raynixl.backends.ucx import UcxBackend
from raynixl.testing.far import pattern
from raynixl.testing.places import FarProcess

pytest.importorskip("ucxx", reason="the ucx backend needs ucxx")
pytestmark = pytest.mark.usefixtures("nothing_left")
N = 64 << 10
CONNECTIONS = 10_000
STRANGE = "127.0.0.9"
ON_LOOPBACK: dict[str, Any] = {
    "secret": b"of this job", "backends": ("ucx",), "ucx": {"TLS": "tcp", "NET_DEVICES": "lo"}
}  # fmt: skip


@pytest.fixture
def far(nothing_left: Callable[[], list[str]]) -> Iterator[FarProcess]:
    """An agent of another process with a region 'theirs'."""
    made = FarProcess(UcxBackend, make_config(**ON_LOOPBACK), is_busy=False, launch=warm.popen)
    made.open("far")
    made.ask("make", "theirs", N, "arena", 1)
    yield made
    made.close()


@pytest.fixture
def near(nothing_left: Callable[[], list[str]]) -> Iterator[Agent]:
    """An agent of this process."""
    with make_agent("near", **ON_LOOPBACK) as made:
        yield made


def check_reads(near: Agent, far: FarProcess, seed: int) -> None:
    """The bytes of the far region arrive."""
    far.ask("fill", "theirs", seed)
    mine = near.empty(N)
    near.read(near.peer("far")["theirs"], mine).wait(PATIENCE)
    assert mine.array().tobytes() == pattern(N, seed).tobytes()
    near.deregister(mine)


def test_only_the_addresses_of_peers_reach_the_ports_and_only_while_they_are_peers(
    near: Agent, far: FarProcess
) -> None:
    near.peer(far.ask("record"))
    check_reads(near, far, 1)
    theirs, ours = ucx_ports(far.pid, far.ask("record")), ucx_ports(os.getpid(), near.record())
    assert len(theirs) == 2, "one to post by and one to serve"
    assert len(ours) == 3, "and one to post emulated reads by, as it reaches somebody over TCP"
    port = min(theirs)
    for one in theirs | ours:
        assert is_heard(one)
        assert not is_heard(one, source=STRANGE)
    check_reads(near, far, 2)
    near.close()
    eventually(lambda: not is_heard(port), "the address of a peer that has gone to be dismissed")
    assert not is_heard(port, source=STRANGE)
    with make_agent("next", **ON_LOOPBACK) as later:
        later.peer(far.ask("record"))
        check_reads(later, far, 3)


def test_agents_of_one_process_that_start_ucx_at_once_have_their_own_ports_guarded(
    nothing_left: Callable[[], list[str]],
) -> None:
    with contextlib.ExitStack() as opened:
        agents = [opened.enter_context(make_agent(f"a{n}", **ON_LOOPBACK)) for n in range(4)]
        introduce(*agents)
        for number, one in enumerate(agents):
            one.register(random_bytes(N, number), name="own")
        mine = [one.empty(N) for one in agents]
        for step in (1, 2):
            transfers = [one.read(one.peer(f"a{(n + step) % 4}")["own"], mine[n]) for n, one in enumerate(agents)]
            for number, one in enumerate(transfers):
                one.wait(PATIENCE)
                assert (mine[number].array() == random_bytes(N, (number + step) % 4)).all()
        ports = set.intersection(*(ucx_ports(os.getpid(), one.record()) for one in agents))
        assert len(ports) == 3 * 4, "one to post by, one to serve and one to read by, however many peers there are"
        assert not [one for one in ports if is_heard(one, source=STRANGE)]


def test_ten_thousand_connections_of_random_bytes_leave_transfers_alone(near: Agent, far: FarProcess) -> None:
    near.peer(far.ask("record"))
    check_reads(near, far, 1)
    ports = sorted(ucx_ports(far.pid, far.ask("record")))
    dice = random.Random(5)
    before = len(os.listdir(f"/proc/{far.pid}/fd"))
    for number in range(CONNECTIONS):
        _throw(ports[number % len(ports)], dice)
        if number % 1000 == 0:
            check_reads(near, far, number)
    eventually(lambda: len(os.listdir(f"/proc/{far.pid}/fd")) <= before + 3, "its descriptors to be given back")
    check_reads(near, far, 7)


def _throw(port: tuple[str, int], dice: random.Random) -> None:
    """Connect and send a few random bytes; half of them after the number with which UCX's protocol begins."""
    body = dice.randbytes(dice.choice((0, 1, 4, 8, 13, 200, 2000)))
    with contextlib.suppress(ConnectionError), socket.create_connection(port, timeout=PATIENCE) as sock:
        sock.sendall(MAGIC + _not_a_message(body) if dice.random() < 0.5 else body)


def _not_a_message(body: bytes) -> bytes:
    """Make the length that follows larger than what is sent: a whole message would be carried out, whatever it says."""
    return body[:4] + b"\x7f" + body[5:] if len(body) > 4 else body


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"ucx": {"NET_DEVICES": "nope0"}}, "UCX_NET_DEVICES=nope0"),
        ({"ucx": {"TLS": "tcp"}, "rails": ("lo", "nope0")}, "rails='nope0'"),
    ],
    ids=["NET_DEVICES", "rails"],
)
def test_a_device_that_ucx_does_not_have_is_refused_and_those_it_has_are_named(
    near: Agent, settings: dict[str, Any], names: str
) -> None:
    near.register(random_bytes(N), name="own")
    with make_agent("lost", **(ON_LOOPBACK | settings)) as lost:
        introduce(lost, near)
        with pytest.raises(BackendUnavailable) as caught:
            lost.read(lost.peer("near")["own"], lost.empty(N)).wait(PATIENCE)
    assert names in str(caught.value)
    assert "lo" in str(caught.value).partition("it has ")[2]


def test_a_variable_that_names_an_unknown_device_is_named_too(near: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "nope0")
    near.register(random_bytes(N), name="own")
    with make_agent("lost", **(ON_LOOPBACK | {"ucx": {}})) as lost:
        introduce(lost, near)
        with pytest.raises(BackendUnavailable, match="UCX_NET_DEVICES=nope0 names no"):
            lost.read(lost.peer("near")["own"], lost.empty(N)).wait(PATIENCE)


@contextlib.contextmanager
def _three_ports(held: int) -> Iterator[tuple[list[socket.socket], int]]:
    """Three ports side by side, the lowest of which are held by sockets, and the lowest of all."""
    for _ in range(100):
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            holders = [opened.enter_context(socket.create_server(("127.0.0.1", 0)))]
            port = holders[0].getsockname()[1]
            holders += [opened.enter_context(socket.create_server(("127.0.0.1", port + n))) for n in (1, 2)]
            for free in holders[held:]:
                free.close()
            yield holders[:held], port
            return
    raise AssertionError("no three ports side by side are free")


@pytest.mark.parametrize("held", [1, 2], ids=["none to read by", "none to serve by"])
def test_a_range_without_a_free_port_is_refused_instead_of_searched_for_ever(near: Agent, held: int) -> None:
    near.register(random_bytes(N), name="own")
    with _three_ports(held) as (holders, port):
        ports = f"{port}-{port + 2}"
        options = {"TLS": "tcp", "NET_DEVICES": "lo", "TCP_PORT_RANGE": ports}
        with make_agent("full", **(ON_LOOPBACK | {"ucx": options})) as full:
            introduce(full, near)
            with pytest.raises(BackendUnavailable, match=f"UCX_TCP_PORT_RANGE={ports} has no free port on lo"):
                full.read(full.peer("near")["own"], full.empty(N)).wait(PATIENCE)
            for holder in holders:
                holder.close()
            mine = full.empty(N)
            full.read(full.peer("near")["own"], mine).wait(PATIENCE)
            assert (mine.array() == random_bytes(N)).all()
            assert ucx_ports(os.getpid(), full.record()) >= {("127.0.0.1", port + n) for n in range(3)}


def test_an_agent_that_closes_opens_no_further_port(near: Agent, far: FarProcess) -> None:
    near.peer(far.ask("record"))
    check_reads(near, far, 1)
    backend = near.backend("ucx")
    assert isinstance(backend, UcxBackend)
    runtime, record = backend.network._run(), near.record()
    near.close()
    with pytest.raises(AgentClosed, match="'near' is closed"):
        runtime.reader(0)
    assert not ucx_ports(os.getpid(), record)
