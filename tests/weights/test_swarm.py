"""The swarm's policy: who pulls what from whom, whatever the receivers do and whoever fails them."""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from swarm_crowd import NEVER, Crowd, numbers

from raynixl.errors import ConfigError
from raynixl.weights.assignment import ORIGIN, Assignment, Policy, Why
from raynixl.weights.swarm import Swarm, bitmap

pytestmark = pytest.mark.pure

EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def every(chunks):
    return bitmap(range(chunks), chunks)


# topologies


def test_one_receiver_gets_everything_from_the_origin_at_once():
    swarm = Swarm(100, origin_hosts=["trainer"])
    swarm.join("a", "h")
    found = swarm.next("a", 4, 0.0)
    assert numbers(found) == set(range(100))
    assert {item.holder for item in found} == {ORIGIN}
    assert swarm.next("a", 4, 0.0) == []
    swarm.done("a", range(100), 1.0)
    assert swarm.is_complete("a")
    assert swarm.is_released
    assert swarm.is_finished


@pytest.mark.parametrize(
    ("origins", "receivers", "is_direct"),
    [
        (["t"], ["h1", "h2"], False),  # two links against one
        (["t", "u"], ["h1", "h2"], True),
        (["t", "u"], ["h1", "h1"], False),  # a host brings a chunk in once
        (["t"], ["t", "t", "t", "t"], True),  # all on one machine
        (["t"], ["t"] * 5, False),
        (["t"], ["t", "h1"], True),
    ],
)
def test_auto_is_direct_while_the_receivers_links_do_not_exceed_the_origins(origins, receivers, is_direct):
    swarm = Swarm(50, origin_hosts=origins)
    for number, host in enumerate(receivers):
        swarm.join(str(number), host)
    assert (len(swarm.next("0", 4, 0.0)) == 50) is is_direct


def test_uplinks_say_how_many_receivers_the_origin_is_worth():
    swarm = Swarm(50, origin_hosts=["t"], policy=Policy(uplinks=3.0))
    for number in range(3):
        swarm.join(str(number), f"h{number}")
    assert all(len(swarm.next(str(number), 4, 0.0)) == 50 for number in range(3))


def test_direct_receivers_begin_at_different_places():
    swarm = Swarm(60, origin_hosts=["t"], topology="direct")
    for number in range(3):
        swarm.join(str(number), f"h{number}")
    assert [swarm.next(str(number), 1, 0.0)[0].chunk for number in range(3)] == [0, 20, 40]


def test_an_unknown_topology_is_refused():
    with pytest.raises(ConfigError, match="ring"):
        Swarm(1, origin_hosts=["t"], topology="ring")


# relaying


@pytest.mark.parametrize("receivers", [1, 2, 3, 4, 8, 16])
def test_the_origin_gives_hardly_more_than_each_chunk_once(receivers):
    crowd = Crowd(200, hosts=[f"h{number}" for number in range(receivers)], seed=receivers)
    for number in range(receivers):
        crowd.join(str(number))
    crowd.run()
    assert crowd.is_complete()
    assert 200 <= len(crowd.asked_of_origin) == crowd.swarm.origin_chunks <= 210


def test_a_host_brings_each_chunk_in_once_and_copies_it_inside():
    crowd = Crowd(100, hosts=["h1", "h2"], seed=3)
    for number in range(8):
        crowd.join(str(number))
    crowd.run()  # every assignment is checked
    assert crowd.is_complete()


def test_the_same_host_is_preferred():
    swarm = Swarm(10, origin_hosts=["t"], topology="relay", policy=NEVER)
    swarm.join("near", "h", every(10))
    swarm.join("far", "g", every(10))
    swarm.join("a", "h")
    assert {item.holder for item in swarm.next("a", 3, 0.0)} == {"near"}


def test_rarer_chunks_come_first():
    swarm = Swarm(20, origin_hosts=[], policy=NEVER)
    swarm.join("all", "h0", every(20))
    for number in range(1, 8):
        swarm.join(str(number), f"h{number}", bitmap(range(18), 20))
    swarm.join("a", "h9")
    assert numbers(swarm.next("a", 30, 0.0)) & {18, 19}


def test_load_spreads_over_the_holders():
    swarm = Swarm(64, origin_hosts=[], policy=NEVER)
    for number in range(8):
        swarm.join(str(number), f"h{number}", every(64))
    swarm.join("a", "g")
    holders = [item.holder for item in swarm.next("a", 8, 0.0)]
    assert len(set(holders)) == 8


def test_a_parked_receiver_gets_what_becomes_possible():
    swarm = Swarm(2, origin_hosts=["t"], topology="relay", policy=NEVER)
    swarm.join("a", "h1")
    swarm.join("b", "h2")
    assert len(swarm.next("a", 2, 0.0)) == 2
    assert swarm.next("b", 2, 0.0) == []
    assert swarm.dispatch(0.0) == []
    swarm.done("a", [1], 0.1)
    assert swarm.dispatch(0.1) == [("b", [Assignment(1, "a")])]
    assert swarm.dispatch(0.1) == []


def test_a_late_joiner_takes_nothing_from_the_origin_where_a_peer_has_the_version():
    swarm = Swarm(40, origin_hosts=["t"], policy=NEVER)
    swarm.join("a", "h1", every(40))
    swarm.join("late", "h2")
    seen = set()
    while not swarm.is_complete("late"):
        found = swarm.next("late", 4, 0.0)
        seen |= {item.holder for item in found}
        swarm.done("late", numbers(found), 0.0)
    assert seen == {"a"}
    assert swarm.origin_chunks == 0


# release


def test_the_origin_is_released_once_each_chunk_has_two_holders_or_all_receivers():
    swarm = Swarm(3, origin_hosts=["t"], topology="relay", policy=NEVER)
    assert not swarm.is_released
    swarm.join("a", "h1")
    swarm.join("b", "h2")
    swarm.done("a", [0, 1, 2], 0.0)
    assert not swarm.is_released
    swarm.done("b", [0, 1], 0.0)
    assert not swarm.is_released
    swarm.done("b", [2], 0.0)
    assert swarm.is_released
    swarm.leave("b")
    assert swarm.is_released  # of the one that is left


def test_one_copy_is_enough_where_the_policy_says_so():
    swarm = Swarm(3, origin_hosts=["t"], topology="relay", policy=Policy(copies=1))
    swarm.join("a", "h1")
    swarm.join("b", "h2")
    swarm.done("a", [0, 1], 0.0)
    assert not swarm.is_released
    swarm.done("b", [2], 0.0)
    assert swarm.is_released
    swarm.release_origin()
    assert swarm.lost == ()
    assert swarm.next("a", 4, 0.0) == [Assignment(2, "b")]
    swarm.leave("b")
    swarm.failed("a", 2, "b", Why.LOST, 0.1)
    assert swarm.lost == (2,)


# faults


def test_a_failed_chunk_comes_from_somebody_else():
    swarm = Swarm(1, origin_hosts=[], policy=NEVER)
    swarm.join("bad", "h1", every(1))
    swarm.join("a", "h3")
    assert swarm.next("a", 1, 0.0) == [Assignment(0, "bad")]
    swarm.join("good", "h2", every(1))
    swarm.failed("a", 0, "bad", Why.STALLED, 0.1)
    assert swarm.next("a", 1, 0.2) == [Assignment(0, "good")]


def test_a_pause_ends():
    swarm = Swarm(1, origin_hosts=["t"], policy=Policy(pause_seconds=1.0))
    swarm.join("a", "h")
    assert swarm.next("a", 1, 0.0) == [Assignment(0, ORIGIN)]
    swarm.failed("a", 0, ORIGIN, Why.LOST, 0.1)
    assert swarm.next("a", 1, 0.2) == []
    swarm.tick(0.5)
    assert swarm.dispatch(0.5) == []
    swarm.tick(1.2)
    assert swarm.dispatch(1.2) == [("a", [Assignment(0, ORIGIN)])]


def test_a_liar_serves_no_more_and_is_named():
    swarm = Swarm(4, origin_hosts=["t"], topology="relay", policy=NEVER)
    swarm.join("liar", "h1", every(4))
    swarm.join("a", "h2")
    swarm.join("b", "h3")
    first = swarm.next("a", 1, 0.0)[0]
    assert first.holder == "liar"
    swarm.failed("a", first.chunk, "liar", Why.CORRUPT, 0.1)
    assert swarm.liars == ("liar",)
    assert {item.holder for item in swarm.next("b", 4, 0.2)} == {ORIGIN}
    swarm.leave("liar")
    swarm.join("liar", "h1", every(4))
    assert "liar" not in {item.holder for item in swarm.next("a", 4, 0.3)}


def test_who_finds_everybody_corrupt_is_not_believed():
    swarm = Swarm(8, origin_hosts=[], policy=NEVER)
    for name in "xyz":
        swarm.join(name, f"h-{name}", every(8))
    swarm.join("broken", "h1")
    swarm.join("b", "h2")
    accused = set()
    while item := next(iter(swarm.next("broken", 1, 0.0)), None):
        accused.add(item.holder)
        swarm.failed("broken", item.chunk, item.holder, Why.CORRUPT, 0.0)
    assert accused == set("xyz")
    assert swarm.liars == ()
    assert {item.holder for item in swarm.next("b", 8, 0.0)} <= set("xyz")
    assert len(swarm.next("b", 8, 0.0)) + 8 >= 8


def test_a_chunk_that_the_origin_gives_corrupt_again_and_again_is_lost():
    swarm = Swarm(2, origin_hosts=["t"], policy=NEVER)
    swarm.join("a", "h")
    swarm.next("a", 2, 0.0)
    for _ in range(3):
        swarm.failed("a", 1, ORIGIN, Why.CORRUPT, 0.0)
        swarm.next("a", 2, 0.0)
    assert swarm.lost == (1,)


def test_a_holder_that_two_could_not_reach_is_left_alone_for_a_while():
    swarm = Swarm(8, origin_hosts=[], policy=Policy(pause_seconds=1.0))
    swarm.join("frozen", "h0", every(8))
    for number in range(1, 4):
        swarm.join(str(number), f"h{number}")
    for number in (1, 2):
        item = swarm.next(str(number), 1, 0.0)[0]
        swarm.failed(str(number), item.chunk, item.holder, Why.STALLED, 0.5)
    assert swarm.next("3", 1, 0.6) == []
    assert swarm.lost == ()  # it may come back
    swarm.tick(1.6)
    assert {item.holder for _, items in swarm.dispatch(1.6) for item in items} == {"frozen"}


def test_a_stale_holder_gives_nothing_more():
    swarm = Swarm(4, origin_hosts=[], policy=NEVER)
    swarm.join("old", "h1", every(4))
    swarm.join("a", "h2")
    item = swarm.next("a", 1, 0.0)[0]
    swarm.failed("a", item.chunk, "old", Why.STALE, 0.0)
    assert swarm.next("a", 4, 9.0) == []
    assert swarm.lost == (0, 1, 2, 3)


def test_what_a_dead_receiver_was_bringing_in_is_given_to_others():
    swarm = Swarm(4, origin_hosts=["t"], topology="relay", policy=NEVER)
    swarm.join("dead", "h1")
    swarm.join("b", "h2")
    assert len(swarm.next("dead", 4, 0.0)) == 4
    assert swarm.next("b", 4, 0.0) == []
    swarm.leave("dead")
    assert numbers(dict(swarm.dispatch(0.1))["b"]) == {0, 1, 2, 3}


def test_news_of_one_that_left_is_ignored():
    swarm = Swarm(4, origin_hosts=["t"], policy=NEVER)
    swarm.join("a", "h")
    swarm.leave("a")
    swarm.leave("a")
    swarm.done("a", [0], 0.0)
    swarm.failed("a", 0, ORIGIN, Why.LOST, 0.0)
    assert "a" not in swarm
    with pytest.raises(ConfigError, match="takes no part"):
        swarm.next("a", 1, 0.0)


def test_nobody_joins_twice():
    swarm = Swarm(4, origin_hosts=["t"])
    swarm.join("a", "h")
    with pytest.raises(ConfigError, match="already"):
        swarm.join("a", "h")
    with pytest.raises(ConfigError):
        swarm.join(ORIGIN, "h")


# always


@EXAMPLES
@given(seed=st.integers(0, 2**32), receivers=st.integers(1, 12), hosts=st.integers(1, 6), chunks=st.integers(1, 40))
def test_all_complete_when_nothing_fails(seed, receivers, hosts, chunks):
    crowd = Crowd(chunks, hosts=["trainer", *map(str, range(hosts))], seed=seed)
    for number in range(receivers):
        crowd.join(f"r{number}")
    crowd.run()
    assert crowd.is_complete()
    assert set(crowd.asked_of_origin) == set(range(chunks))
    assert len(crowd.asked_of_origin) <= chunks * 1.05
    assert crowd.swarm.is_released


@EXAMPLES
@given(
    seed=st.integers(0, 2**32),
    topology=st.sampled_from(["auto", "direct", "relay"]),
    chunks=st.integers(1, 30),
    liars=st.integers(0, 2),
)
def test_whoever_stays_completes_whatever_the_others_do(seed, topology, chunks, liars):
    crowd = Crowd(chunks, hosts=["t", "h1", "h2", "h3"], seed=seed, topology=topology, policy=Policy(stall_seconds=3.0))
    draw = crowd.random
    for number in range(5):
        crowd.join(f"r{number}")
    crowd.liars = {f"r{number}" for number in range(liars)}
    for name in list(crowd.host):
        crowd.ask(name)
    for step in range(chunks * 6):
        pulls, event = crowd.pulls(), draw.random()
        if event < 0.7 and pulls:
            crowd.finish(*draw.choice(pulls))
        elif event < 0.8 and pulls:
            crowd.fail(*draw.choice(pulls), draw.choice([Why.LOST, Why.STALLED]))
        elif event < 0.86:
            crowd.tick(draw.choice([0.2, 0.7, 3.5]))
        elif event < 0.9 and len(crowd.host) > 1:
            crowd.leave(draw.choice(list(crowd.host)))
        elif event < 0.94:
            crowd.join(f"late-{step}")
            crowd.ask(f"late-{step}")
    crowd.run()
    if crowd.swarm.lost:  # the origin was released, and who had them left or lied
        assert crowd.is_released
    else:
        assert crowd.is_complete()


@EXAMPLES
@given(seed=st.integers(0, 2**32), chunks=st.integers(1, 40))
def test_a_coordinator_goes_on_from_the_bitmaps_of_another(seed, chunks):
    first = Crowd(chunks, hosts=["h1", "h2", "h3"], seed=seed)
    for number in range(4):
        first.join(f"r{number}")
        first.ask(f"r{number}")
    for _ in range(chunks * 2):
        if pulls := first.pulls():
            first.finish(*first.random.choice(pulls))
    second = Crowd(chunks, hosts=["h1", "h2", "h3"], seed=seed)
    for name, has in first.has.items():
        assert first.swarm.has(name) == bitmap(has, chunks)
        second.join(name, has)
    second.run()
    assert second.is_complete()
    again = set(second.asked_of_origin) & set.union(*first.has.values())
    assert len(again) <= chunks * 0.05


def test_deciding_costs_microseconds():
    crowd = Crowd(1000, hosts=[f"h{number}" for number in range(64)])
    for number in range(64):
        crowd.join(str(number))
        crowd.ask(str(number))
    began = time.process_time()
    for _ in range(4000):
        crowd.finish(*crowd.random.choice(crowd.pulls()))
    assert time.process_time() - began < 4000 * 1e-3  # a millisecond each, with all the checks of this test
