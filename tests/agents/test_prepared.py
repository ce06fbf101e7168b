"""A prepared operation is resolved once and posted many times, by many threads, and outlives lost connections."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from agent_process import far_agent
from agent_tools import PATIENCE, error_of, eventually, introduce, random_bytes

from raynixl import Agent, PeerLost, PeerRestarted, RegionStale
from raynixl.native import CANCELLED, PENDING, STALE

N = 4096


def test_each_post_moves_what_the_memory_holds_then(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    mine, bobs = alice.register(np.zeros(N, np.uint8)), bob.empty(N, name="far")
    plan = alice.prepare("write", mine, alice.peer("bob")["far"])
    for value in range(200):
        mine.array()[:] = value
        plan.post().wait(PATIENCE)
        assert bobs.array()[0] == bobs.array()[-1] == value
    statistics = alice.statistics()
    assert (statistics.transfers, statistics.nbytes, statistics.failures) == (200, 200 * N, 0)


def test_a_post_that_ends_at_once_is_not_timed_and_one_that_takes_longer_is(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    plan = alice.prepare("write", alice.register(np.zeros(N, np.uint8)), bob.empty(N).describe())
    first = plan.post()  # connects
    first.wait(PATIENCE)
    assert first.stats.seconds is not None
    assert 0 < first.stats.seconds < PATIENCE
    assert [plan.post().stats.seconds for _ in range(3)] == [None] * 3
    notified = plan.post(notify=b"here")
    notified.wait(PATIENCE)
    assert notified.stats.seconds is not None


def test_threads_post_to_several_peers_at_once(new_agent: Callable[..., Agent], backend: str) -> None:
    """Each of 9 threads has its own rows at each of 3 peers; every row ends with the value that was last written."""
    alice = new_agent("alice", backends=(backend,), copy_threads=2)
    peers = [new_agent(f"peer {i}", backends=(backend,)) for i in range(3)]
    introduce(alice, *peers)
    threads, rounds, row = 9, 60, 2048
    far = [peer.empty(threads * row) if i else peer.register(bytearray(threads * row)) for i, peer in enumerate(peers)]
    mine = [alice.register(np.zeros(row, np.uint8)) for _ in range(threads)]
    back = [alice.empty(row) for _ in range(threads)]
    failures: list[object] = []
    start = threading.Barrier(threads)

    def post(number: int) -> None:
        span = slice(number * row, (number + 1) * row)
        writes = [alice.prepare("write", mine[number], region.describe()[span]) for region in far]
        reads = [alice.prepare("read", region.describe()[span], back[number]) for region in far]
        start.wait(PATIENCE)
        try:
            for turn in range(rounds):
                value = random_bytes(row, turn * threads + number)
                mine[number].array()[:] = value
                for transfer in [plan.post(notify=b"x" if turn % 7 == 0 else None) for plan in writes]:
                    transfer.wait(PATIENCE)
                for plan in reads:
                    plan.post().wait(PATIENCE)
                    assert np.array_equal(back[number].array(), value)
        except BaseException as exc:  # noqa: BLE001 - told to the test
            failures.append(exc)

    workers = [threading.Thread(target=post, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not failures, failures
    for region in far:
        expected = [random_bytes(row, (rounds - 1) * threads + number) for number in range(threads)]
        assert np.array_equal(region.array().reshape(threads, row), np.array(expected))
    for peer in peers:
        eventually(lambda peer=peer: len(peer.control.notifications) == threads * 9, "every notification came")
    statistics = alice.statistics()
    assert (statistics.transfers, statistics.failures) == (threads * rounds * 3 * 2, 0)
    assert statistics.notifications_sent == threads * 9 * 3


def test_one_plan_is_posted_by_many_threads_at_once(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    mine, bobs = alice.register(random_bytes(N)), bob.empty(N, name="far")
    plan = alice.prepare("write", mine, alice.peer("bob")["far"])
    threads = [threading.Thread(target=lambda: [plan.post().wait(PATIENCE) for _ in range(200)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert np.array_equal(bobs.array(), random_bytes(N))
    assert alice.statistics().transfers == 1600


def test_posting_goes_on_after_a_lost_connection(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    mine = alice.register(random_bytes(N))
    bobs = [bob.empty(N // 2), bob.register(bytearray(N // 2))]  # two paths: mapped and, over shm, process_vm
    for theirs in ([one.describe() for one in bobs], [bobs[0].describe()]):
        plan = alice.prepare("write", mine[: len(theirs) * N // 2], theirs)
        for turn in range(3):
            mine.array()[:] = random_bytes(N, turn)
            plan.post().wait(PATIENCE)
            assert np.array_equal(bobs[0].array(), random_bytes(N, turn)[: N // 2])
            connection = alice.connector.current("bob")
            assert connection is not None
            connection.link.close(PeerLost("cut by the test"))
            eventually(lambda: connection.lost, "the loss is noticed")  # noqa: B023 - called at once
            alice.peer(bob.record())


def test_a_plan_of_a_restarted_peer_says_so_and_the_new_one_is_used_by_name(new_agent: Callable[..., Agent]) -> None:
    alice = new_agent("alice", backends=("shm",))
    mine = alice.register(random_bytes(N))
    with far_agent("bob") as far:
        alice.peer(far.record)
        far.ask("region", name="far", nbytes=N)
        plan = alice.prepare("write", mine, alice.peer("bob")["far"])
        plan.post().wait(PATIENCE)
        far.kill()
        eventually(lambda: alice.lost("bob"), "the death is noticed")
        assert isinstance(error_of(plan.post()), PeerLost)
    with far_agent("bob") as far:
        alice.peer(far.record)
        far.ask("region", name="far", nbytes=N)
        assert isinstance(error_of(plan.post()), PeerRestarted)
        alice.write(mine, alice.peer("bob")["far"]).wait(PATIENCE)
        assert far.ask("values", name="far") == sorted({int(value) for value in mine.array()})


def test_what_has_begun_is_known_of_a_post_that_is_refused_for_another_part_of_it(pair: tuple[Agent, Agent]) -> None:
    class Late:
        """A job that cannot be stopped, as that of a GPU."""

        code = PENDING

        def cancel(self, code: int) -> bool:
            self.code = code
            return True

        def wait_settled(self, timeout: float) -> bool:
            return False

    near, far = pair
    theirs, mine, late = far.register(random_bytes(64, 1), name="theirs"), near.empty(64), Late()
    plan = near.prepare("read", near.peer(far.name)[theirs.name], mine)
    plan.post().wait(PATIENCE)
    assert plan._route is not None
    plan._route.programs[:] = [SimpleNamespace(run=lambda _seconds: late), SimpleNamespace(run=lambda _seconds: STALE)]
    plan._fast = None
    transfer = plan.post()
    assert isinstance(error_of(transfer), RegionStale)
    assert list(transfer.jobs) == [late]
    assert late.code == CANCELLED
