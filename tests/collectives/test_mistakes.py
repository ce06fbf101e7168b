"""Members that do not do as the others do: a typed error that names them, at once, on every other member."""

import threading
import time

import numpy as np
import pytest

from raynixl import Agent, InMemoryDirectory
from raynixl.collectives import Group
from raynixl.collectives.registrations import KEPT_NBYTES
from raynixl.errors import ConfigError, PeerLost, RangeError, RaynixlError
from tests.collectives.members import DEADLINE, in_threads


def error_of(operation):
    try:
        operation()
    except RaynixlError as exc:
        return exc
    return None


def buffer(nbytes=100):
    return np.zeros(nbytes, np.uint8)


OTHERS = {
    "broadcast": lambda group: group.broadcast(buffer()),
    "another root": lambda group: group.broadcast(buffer(), 1),
    "chain": lambda group: group.broadcast(buffer(), algorithm="chain"),
    "no bytes": lambda group: group.broadcast(buffer(0)),
    "gather": lambda group: group.gather(buffer(), buffer(300)),
    "allgather": lambda group: group.allgather(buffer(), buffer(300)),
    "scatter": lambda group: group.scatter(buffer(300), buffer()),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_member_that_calls_another_operation_is_named_at_once(other):
    def work(group):
        operation = OTHERS[other] if group.rank == 1 else lambda group: group.barrier()
        return error_of(lambda: operation(group))

    began = time.monotonic()
    errors = in_threads(3, work)
    assert time.monotonic() - began < 15
    assert all(isinstance(error, ConfigError) for error in errors), errors
    assert any(error.peer and "'barrier'" in str(error) and "we" in str(error) for error in errors)


@pytest.mark.parametrize("algorithm", ["direct", "chain"])
@pytest.mark.parametrize("lengths", [(100, 101, 100), (100, 0, 100), (0, 100, 100), (100, 100, 99)])
def test_a_member_with_another_length_is_named_at_once(algorithm, lengths):
    def work(group):
        error = error_of(lambda: group.broadcast(buffer(lengths[group.rank]), algorithm=algorithm))
        return error or error_of(group.barrier)  # who was done before hears of it next

    began = time.monotonic()
    errors = in_threads(3, work)
    assert time.monotonic() - began < 15
    assert all(isinstance(error, RangeError | ConfigError) for error in errors), errors
    assert any(isinstance(error, RangeError) and error.peer for error in errors)


def test_a_wrong_argument_of_one_member_reaches_the_others():
    frozen = buffer()
    frozen.flags.writeable = False

    def work(group):
        out = frozen if group.rank == 1 else buffer()
        return error_of(lambda: group.scatter(buffer(300), out, 1))

    began = time.monotonic()
    errors = in_threads(3, work)
    assert all(isinstance(error, RaynixlError) for error in errors), errors
    assert time.monotonic() - began < 15


def test_an_interrupted_member_ends_the_group_for_all(monkeypatch):
    def work(group):
        if group.rank == 1:
            monkeypatch.setattr(group._executor, "_do", interrupt)
            with pytest.raises(KeyboardInterrupt):
                group.barrier()
            return error_of(group.barrier)
        return error_of(group.barrier)

    def interrupt(*_arguments):
        raise KeyboardInterrupt

    began = time.monotonic()
    errors = in_threads(3, work)
    assert time.monotonic() - began < 15
    assert all(isinstance(error, RaynixlError) for error in errors)


def test_a_member_that_has_done_its_part_may_leave_before_the_others():
    has_left = threading.Event()

    def work(group):
        out, run = buffer(300), group._executor.run
        if group.rank == 2:
            group._executor.run = lambda *steps, **how: has_left.wait(20) and run(*steps, **how)
        error = error_of(lambda: group.gather(buffer() + group.rank, out))
        if group.rank == 1:
            group.close()
            group._agent.close()
            has_left.set()
        return error, sorted(set(out.tolist()))

    assert in_threads(3, work) == [(None, [0, 1, 2]), (None, [0]), (None, [0])]


def test_two_groups_on_the_same_agents_do_not_mix():
    directory = InMemoryDirectory()
    names = ["a", "b", "c"]
    agents = [Agent(name, directory=directory) for name in names]
    wrong = []

    def run(agent, name, order, seed):
        with Group(agent, order, name=name, timeout=20) as group:
            for number in range(50):
                data = np.full(3000, seed + number if group.rank == number % 3 else 0, np.uint8)
                group.broadcast(data, number % 3)
                if not (data == seed + number).all():
                    wrong.append((name, agent.name, number))
                group.barrier()

    try:
        plans = (("one", names, 1), ("two", names, 101), ("three", names[::-1], 151))
        threads = [threading.Thread(target=run, args=(agent, *plan)) for plan in plans for agent in agents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    finally:
        for agent in agents:
            agent.close()
    assert not wrong


def test_large_buffers_are_not_kept_and_small_ones_are():
    def work(group):
        for _ in range(20):
            group.broadcast(np.zeros(KEPT_NBYTES // 4, np.uint8))
        large = sum(region.nbytes for region in group._registrations._kept.values())
        small = buffer()
        for _ in range(3):
            group.broadcast(small)
        return large, small.nbytes in [region.nbytes for region in group._registrations._kept.values()]

    for large, is_small_kept in in_threads(2, work):
        assert large <= KEPT_NBYTES
        assert is_small_kept


def test_a_killed_member_is_named_even_by_those_who_wait_for_another():
    through = threading.Barrier(4)  # whoever leaves while others are in a step fails those that need nothing of it

    def work(group):
        group.barrier()
        through.wait(DEADLINE)
        if group.rank == 3:
            group._agent.close()
            return None
        return error_of(group.barrier)

    errors = in_threads(4, work)[:3]
    assert [(type(error), error.peer) for error in errors] == [(PeerLost, "m3")] * 3


def test_who_hears_of_a_mistake_is_told_who_says_so_and_to_mend_the_calls():
    def work(group):
        return error_of(lambda: group.barrier() if group.rank == 0 else group.broadcast(buffer(), 1))

    errors = in_threads(2, work)
    assert all(isinstance(error, ConfigError) and "same operation" in error.hint for error in errors), errors


@pytest.mark.parametrize("members", [["a", object()], [1, 2]])
def test_members_that_are_no_names_are_refused(members):
    with Agent("a") as agent, pytest.raises(ConfigError, match="group member"):
        Group(agent, members)


def test_a_name_is_not_taken_for_a_list_of_letters():
    with Agent("a") as agent, pytest.raises(ConfigError, match="each member once"):
        Group(agent, "ab")


@pytest.mark.parametrize("wrong", [5, object(), "text", np.zeros((4, 4), np.uint8)[:, ::2]], ids=type)
def test_what_is_no_memory_is_refused_as_by_register(wrong):
    with Agent("a") as agent, Group(agent, ["a"]) as group, pytest.raises(ConfigError, match="memory"):
        group.broadcast(wrong)


def test_an_array_of_a_gpu_without_elements_moves_nothing():
    class Empty:
        def __init__(self):
            self.__cuda_array_interface__ = {"version": 3, "typestr": "|u1", "shape": (3, 0), "data": (0, False)}

    with Agent("a") as agent, Group(agent, ["a"]) as group:
        group.broadcast(Empty())
        assert agent.statistics().regions == 0
