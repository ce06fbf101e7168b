"""The GCS directory: small records under session and job, leases, names that pass on from the dead only, outages."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from actor_tools import Holder, get, store_keys
from agent_tools import eventually, make_config

import raynixl as rx
from raynixl.actors import GcsDirectory
from raynixl.actors.store import Store
from raynixl.errors import BackendUnavailable
from raynixl.record import AgentRecord

pytestmark = [pytest.mark.pure, pytest.mark.ray]
Make = Callable[..., Any]
GONE = 4_000_000  # above any process id


@pytest.fixture
def directory(cluster: str) -> Iterator[GcsDirectory]:
    """A job's directory of its own, emptied at the end."""
    made = GcsDirectory("session-of-tests", secrets.token_hex(4))
    yield made
    made.end_job()
    assert store_keys(f"raynixl/session-of-tests/{made.job}/") == []


@pytest.fixture
def store(cluster: str) -> Store:
    """The store of the cluster."""
    return Store(cluster)


def _record(name: str, *, lease: float = 60.0, **fields: Any) -> AgentRecord:
    """The record of an agent on another host, which nobody can examine from here."""
    known: dict[str, Any] = {
        "incarnation": secrets.token_hex(16), "host": "elsewhere", "pid": GONE, "started": 0.0,
        "expires": time.time() + lease, "backends": {"shm": {}},
    }  # fmt: skip
    return AgentRecord(name=name, **(known | fields))


def _key(directory: GcsDirectory, name: str) -> str:
    return f"raynixl/session-of-tests/{directory.job}/agents/{name}"


def test_what_is_published_is_found_listed_and_withdrawn(directory: GcsDirectory) -> None:
    record = _record("one")
    directory.publish(record)
    assert directory.find("one") == record
    assert directory.list() == [record]
    directory.withdraw("one", secrets.token_hex(16))
    assert directory.find("one") == record
    directory.withdraw("one", record.incarnation)
    assert directory.find("one") is None
    assert directory.list() == []


@pytest.mark.parametrize("name", ["a/b", "../secret", "Größe 名", "100%", "%2F", "a" * 200, "?*[x]"])
def test_names_with_odd_characters_are_kept_apart(directory: GcsDirectory, name: str) -> None:
    directory.publish(_record(name))
    directory.publish(_record("other"))
    found = directory.find(name)
    assert found is not None
    assert found.name == name
    assert {one.name for one in directory.list()} == {name, "other"}


def test_a_record_stays_small_with_thousands_of_named_regions(directory: GcsDirectory, store: Store) -> None:
    with rx.Agent("many", config=make_config(), directory=directory) as agent:
        memory = bytearray(8)
        for number in range(3000):
            agent.register(memory, name=f"layers.{number}.mlp.experts.gate_and_up_projection.weight")
        key = _key(directory, "many")
        eventually(lambda: len(store.get(key) or b"") > 20_000, "regions are published")
        assert len(store.get(key) or b"") < 64 << 10
        with rx.Agent("reader", config=make_config(), directory=directory) as reader:
            last = reader.peer("many")["layers.2999.mlp.experts.gate_and_up_projection.weight"]
            assert last.nbytes == 8
    assert store.get(key) is None


def test_leases_are_renewed_and_expire_without_renewal(directory: GcsDirectory, store: Store) -> None:
    with rx.Agent("leased", config=make_config(lease_seconds=0.9), directory=directory):
        first = AgentRecord.from_bytes(store.get(_key(directory, "leased")) or b"").expires
        eventually(
            lambda: AgentRecord.from_bytes(store.get(_key(directory, "leased")) or b"").expires > first + 1.5,
            "the lease is renewed twice",
        )
    directory.publish(_record("silent", lease=0.2))
    eventually(lambda: directory.find("silent") is None, "the lease ends")
    assert _key(directory, "silent") not in store_keys()


def test_a_name_is_not_taken_from_the_living(directory: GcsDirectory) -> None:
    record = _record("held", labels={"actor_id": "ab" * 16})
    directory.publish(record)
    with pytest.raises(rx.ConfigError, match="'held' is taken by process 4000000"):
        directory.publish(_record("held"))
    assert directory.find("held") == record


@pytest.mark.parametrize(
    ("held", "new"),
    [
        ({"lease": -1.0}, {}),
        ({"labels": {"actor_id": "ab" * 16}}, {"labels": {"actor_id": "ab" * 16}}),
        ({"host": ""}, {}),
    ],
    ids=["lease ended", "the same actor restarted", "its socket here is gone"],
)
def test_a_name_is_taken_from_the_dead(directory: GcsDirectory, held: dict[str, Any], new: dict[str, Any]) -> None:
    from raynixl.host import host_identity

    held = {key: host_identity() if key == "host" else value for key, value in held.items()}
    directory.publish(_record("passed-on", **held))
    heir = _record("passed-on", **new)
    directory.publish(heir)
    assert directory.find("passed-on") == heir


def test_a_dead_agents_name_goes_to_one_only(directory: GcsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.publish(_record("wanted", lease=-1.0))
    winner = _record("wanted")
    claim = GcsDirectory._claim

    def claim_late(self: GcsDirectory, key: str, held: AgentRecord) -> bool:
        """Another takes the name between our look and our claim."""
        monkeypatch.setattr(GcsDirectory, "_claim", claim)
        directory.publish(winner)
        return claim(self, key, held)

    monkeypatch.setattr(GcsDirectory, "_claim", claim_late)
    with pytest.raises(rx.ConfigError, match="'wanted' is taken"):
        directory.publish(_record("wanted"))
    assert directory.find("wanted") == winner


@pytest.mark.parametrize(
    "garbage", [b"", b"{}", b"\xff\x00" * 40, b"[" * 5000, _record("another").to_bytes(), _record("x").to_bytes()[:-9]]
)
def test_garbage_in_the_store_is_ignored_logged_and_replaced(
    directory: GcsDirectory, store: Store, caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    store.put(_key(directory, "x"), garbage, overwrite=True)
    with caplog.at_level(logging.WARNING):
        assert directory.find("x") is None
        assert directory.list() == []
    assert "ignored what lies under" in caplog.text
    record = _record("x")
    directory.publish(record)
    assert directory.find("x") == record


def test_a_peer_of_another_job_is_refused_though_it_knows_the_record(cluster: str) -> None:
    first, second = (GcsDirectory("session-of-tests", job) for job in ("job-1", "job-2"))
    assert first.secret != second.secret
    assert GcsDirectory("session-of-tests", "job-1").secret == first.secret
    own = make_config(secret=first.secret)
    foreign = make_config(secret=second.secret)
    with (
        rx.Agent("one", config=own, directory=first) as one,
        rx.Agent("two", config=foreign, directory=second) as two,
    ):
        with pytest.raises(rx.PeerUnknown):
            two.peer("one")
        with pytest.raises(rx.ConfigError, match="secret"):
            two.peer(one.record()).connect()
    for directory in (first, second):
        directory.end_job()


def test_what_a_finished_job_left_is_swept_by_the_next_and_a_living_agents_record_is_not(
    directory: GcsDirectory, store: Store
) -> None:
    prefix = "raynixl/session-of-tests/f0000000/"
    finished = GcsDirectory("session-of-tests", "f0000000")
    finished.publish(_record("detached"))
    finished.publish(_record("killed", lease=-1.0))
    directory.sweep()
    assert sorted(store.keys(prefix)) == [f"{prefix}agents/detached", f"{prefix}secret"]
    finished.publish(_record("detached", lease=-1.0, incarnation=finished.list()[0].incarnation))
    directory.sweep()
    assert store.keys(prefix) == []


def _fail(*_: Any, **__: Any) -> Any:
    raise ray.exceptions.RpcError("not now")


def test_an_outage_of_the_store_stops_nobody_who_is_connected(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    get(make(Holder, fill=6, options={"name": "known"}).who.remote())
    mine = rx.agent().empty(1 << 20)
    peer = rx.agent().peer("known")
    rx.agent().read(peer["memory"], mine).wait(timeout=10.0)
    directory = rx.agent().directory
    assert isinstance(directory, GcsDirectory)

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return _fail

    monkeypatch.setattr(directory._store, "_client", Broken())
    mine.array()[:] = 0
    rx.agent().read(rx.agent().peer("known")["memory"], mine).wait(timeout=10.0)
    assert set(mine.array().tolist()) == {6}
    found = directory.find("known")
    assert found is not None  # from what was seen before
    with pytest.raises(BackendUnavailable, match="the GCS does not answer"):
        rx.agent().peer("never seen")
    monkeypatch.undo()
    rx.agent().deregister(mine)
    with pytest.raises(rx.PeerUnknown):
        rx.agent().peer("never seen")
