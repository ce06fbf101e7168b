"""The directory in memory: the meaning of the contract that every directory keeps."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from raynixl import ConfigError, InMemoryDirectory
from raynixl.directory import Directory
from raynixl.record import AgentRecord


def record(name: str = "a", life: str = "1", expires: float = 0.0) -> AgentRecord:
    """A record of one life of an agent."""
    return AgentRecord(name=name, incarnation=life * 32, host="h", pid=1, started=0.0, expires=expires)


@pytest.fixture
def directory() -> InMemoryDirectory:
    """An empty directory."""
    return InMemoryDirectory()


def test_it_is_a_directory(directory: InMemoryDirectory) -> None:
    assert isinstance(directory, Directory)
    assert not directory.has_leases


def test_what_was_published_is_found_and_listed(directory: InMemoryDirectory) -> None:
    directory.publish(record("a"))
    directory.publish(record("b"))
    assert directory.find("a") == record("a")
    assert directory.find("c") is None
    assert directory.list() == [record("a"), record("b")]


def test_an_agent_renews_its_own_record(directory: InMemoryDirectory) -> None:
    directory.publish(record())
    renewed = record(expires=time.time() + 60)
    directory.publish(renewed)
    assert directory.find("a") == renewed


def test_a_name_is_held_by_one_live_agent(directory: InMemoryDirectory) -> None:
    directory.publish(record(life="1"))
    with pytest.raises(ConfigError, match="taken"):
        directory.publish(record(life="2"))
    assert directory.find("a") == record(life="1")


def test_an_expired_record_is_not_found_and_may_be_replaced(directory: InMemoryDirectory) -> None:
    directory.publish(record(life="1", expires=time.time() - 1))
    assert directory.find("a") is None
    assert directory.list() == []
    directory.publish(record(life="2"))
    assert directory.find("a") == record(life="2")


def test_only_its_own_record_is_withdrawn(directory: InMemoryDirectory) -> None:
    directory.publish(record(life="1"))
    directory.withdraw("a", "2" * 32)
    directory.withdraw("b", "1" * 32)
    assert directory.find("a") is not None
    directory.withdraw("a", "1" * 32)
    directory.withdraw("a", "1" * 32)
    assert directory.find("a") is None
    directory.publish(record(life="2"))


def test_of_many_that_want_a_name_one_gets_it(directory: InMemoryDirectory) -> None:
    def publish(life: int) -> bool:
        try:
            directory.publish(record(life=f"{life:x}"))
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(publish, range(16))) == 1


def test_a_closed_directory_is_empty(directory: InMemoryDirectory) -> None:
    directory.publish(record())
    directory.close()
    directory.close()
    assert directory.list() == []
