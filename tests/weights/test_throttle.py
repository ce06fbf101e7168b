"""The throttle: a pull whose bytes have no room in its rate fails by itself, and one that is given up stops waiting."""

import threading
import time

import pytest
import torch

from raynixl.errors import RaynixlError, TransferTimeout
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.throttle import Throttle

pytestmark = pytest.mark.pure

CHUNK = 1 << 16
SLOW_GBPS = 0.004  # eight chunks a second


def weights(value):
    return {"w": torch.full((16 * CHUNK // 4,), float(value))}


@pytest.mark.parametrize("topology", ["direct", "relay"])
def test_a_target_whose_rate_is_too_low_is_excluded_for_that_and_accuses_nobody(fleet, topology):
    source, targets = weights(1), {name: weights(0) for name in ("slow", "r0", "r1")}
    publish(fleet("trainer"), "w", source, chunk_nbytes=CHUNK)
    for name, target in targets.items():
        subscribe(fleet(name), "w", target, max_gbps=SLOW_GBPS / 8 if name == "slow" else None)  # 16 s for all of it
    sync = WeightSync(fleet.agents[0], "w", ["trainer"], list(targets), topology=topology, timeout=6.0)
    report = sync.push(1)
    assert list(report.excluded) == ["slow"]
    assert isinstance(report.excluded["slow"], TransferTimeout)
    assert "Gbit/s" in str(report.excluded["slow"])
    assert all(targets[name]["w"].eq(1).all() for name in ("r0", "r1"))


def test_a_newer_push_ends_the_wait_for_a_turn(fleet):
    source, target = weights(1), weights(0)
    publish(fleet("trainer"), "w", source, chunk_nbytes=16 * CHUNK // 2)  # each takes a second
    subscription = subscribe(fleet("r0"), "w", target, max_gbps=SLOW_GBPS)
    first, second = (WeightSync(fleet.agents[0], "w", ["trainer"], ["r0"], timeout=20.0) for _ in range(2))
    pushing = threading.Thread(target=first.push, args=(1,))
    pushing.start()
    deadline = time.monotonic() + 10
    while not subscription._follower._busy.locked():
        assert time.monotonic() < deadline
    assert not second.push(2).excluded
    pushing.join(20)
    assert subscription.version == 2


@pytest.mark.parametrize("topology", ["direct", "relay"])
def test_a_pull_whose_agent_is_closed_ends_soon(fleet, topology):
    publish(fleet("trainer"), "w", weights(1), chunk_nbytes=CHUNK)
    subscriptions = [subscribe(fleet(name), "w", weights(0), max_gbps=SLOW_GBPS / 100) for name in ("r0", "r1")]
    sync = WeightSync(fleet.agents[0], "w", ["trainer"], ["r0", "r1"], topology=topology, timeout=60.0)
    pushing = threading.Thread(target=sync.push, args=(1,))
    pushing.start()
    deadline = time.monotonic() + 10
    while not all(one._follower._busy.locked() for one in subscriptions):
        assert time.monotonic() < deadline
    for agent in fleet.agents[1:]:
        agent.close()
    while any(one._follower._busy.locked() for one in subscriptions):
        assert time.monotonic() < deadline
    pushing.join(10)
    assert not pushing.is_alive()


def test_a_pull_whose_pusher_is_gone_does_not_keep_another_one_waiting(fleet):
    publish(fleet("trainer"), "w", weights(1), chunk_nbytes=CHUNK)
    subscription = subscribe(fleet("r0"), "w", weights(0), max_gbps=SLOW_GBPS / 100)
    first, second = (WeightSync(fleet(name), "w", ["trainer"], ["r0"], timeout=60.0) for name in ("first", "second"))
    pushing = threading.Thread(target=failing_push, args=(first,))
    pushing.start()
    deadline = time.monotonic() + 10
    while not subscription._follower._busy.locked():
        assert time.monotonic() < deadline
    first._agent.close()
    assert second.lag(timeout=5.0) == {"r0": 0}
    pushing.join(10)
    assert not pushing.is_alive()


def failing_push(sync):
    with pytest.raises(RaynixlError):
        sync.push(1).raise_for_excluded()


def test_bytes_that_were_given_up_take_no_room():
    throttle = Throttle(1.0)
    throttle.take(1 << 20, 60.0, lambda: False)
    for _ in range(100):
        throttle.take(1 << 30, 60.0, lambda: True)
    throttle.take(1 << 20, 1.0, lambda: False)  # raises if the others had room
