"""Two hosts joined by two cables: large transfers take both, and hosts with different rails use what they share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from agent_tools import make_config
from hosts_tools import Bed, Host

from raynixl import BackendUnavailable, PeerLost, TransferTimeout
from raynixl.backends.ucx import UcxBackend
from raynixl.testing.far import pattern
from raynixl.testing.places import FarProcess

pytest.importorskip("ucxx", reason="the ucx backend needs ucxx")
N = 24 << 20
GBIT = 1.0
ROUNDS = 5
BOTH = ("eth0", "eth1")
Put = Callable[..., FarProcess]


@pytest.fixture
def cables(bed: Bed) -> Bed:
    """Two hosts with two cables each."""
    bed.second_rail()
    return bed


@pytest.fixture
def put(cables: Bed, nothing_left: Callable[[], list[str]]) -> Iterator[Put]:
    """Put agents on hosts, each with two regions: put(host, name, rails, ...)."""
    made: list[FarProcess] = []

    def start(host: Host, name: str, rails: Sequence[str], **settings: Any) -> FarProcess:
        config = make_config(secret=b"of the hosts", ucx={"TLS": "tcp"}, rails=tuple(rails), **settings)
        far = FarProcess(UcxBackend, config, is_busy=False, launch=host.run_warm)
        made.append(far)
        far.open(name)
        for seed, region in enumerate(("one", "other")):
            far.ask("make", region, N, "user", seed)
        return far

    yield start
    for far in made:
        far.close()


def meet(*agents: FarProcess) -> None:
    """Make every agent known to every other."""
    for one in agents:
        for other in agents:
            if one is not other:
                one.ask("meet", other.ask("record"))


def check_moves(near: FarProcess, far: FarProcess, peer: str, seed: int) -> None:
    """Bytes arrive by reading and by writing."""
    far.ask("fill", "one", seed)
    near.ask("copy", "read", "one", peer, "one")
    assert near.ask("content", "one") == pattern(N, seed).tobytes()
    near.ask("fill", "other", seed + 1)
    near.ask("copy", "write", "other", peer, "other")
    assert far.ask("content", "other") == pattern(N, seed + 1).tobytes()


def seconds(near: FarProcess, op: str, peer: str) -> float:
    """How long one transfer takes, as a rule."""
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        near.ask("copy", op, "one", peer, "one")
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def test_a_large_transfer_over_two_cables_is_faster_than_over_one(cables: Bed, put: Put) -> None:
    first, second = cables
    for host in cables:
        for rail in range(2):
            cables.cap(host, GBIT, rail=rail)
    taken = {}
    for number, rails in enumerate((BOTH, BOTH[:1])):
        near, far = put(first, f"near{number}", rails), put(second, f"far{number}", rails)
        meet(near, far)
        check_moves(near, far, f"far{number}", seed=10 + number)
        taken[rails] = {op: seconds(near, op, f"far{number}") for op in ("read", "write")}
        near.close_agent()
        far.close_agent()
    for op in ("read", "write"):
        one, both = taken[BOTH[:1]][op], taken[BOTH][op]
        print(f"{op}: {8 * N / one / 1e9:.2f} Gbit/s over one cable, {8 * N / both / 1e9:.2f} over two")
        assert one / both > 1.5


@pytest.mark.parametrize(
    ("ours", "others"),
    [(BOTH, ("eth0",)), (("eth1",), BOTH), (BOTH, BOTH[::-1]), (BOTH, ())],
    ids=["two to one", "one to two", "in another order", "two to whatever UCX chooses"],
)
def test_hosts_with_different_rails_use_those_that_reach_each_other(
    cables: Bed, put: Put, ours: Sequence[str], others: Sequence[str]
) -> None:
    first, second = cables
    near, far = put(first, "near", ours), put(second, "far", others)
    meet(near, far)
    check_moves(near, far, "far", seed=20)
    check_moves(far, near, "near", seed=30)


def test_hosts_whose_rails_have_no_cable_in_common_are_told_what_to_look_at(cables: Bed, put: Put) -> None:
    first, second = cables
    near, far = put(first, "near", ("eth0",)), put(second, "far", ("eth1",))
    meet(near, far)
    with pytest.raises(BackendUnavailable, match="by no transport") as caught:
        near.ask("copy", "read", "one", "far", "one")
    assert "NET_DEVICES" in str(caught.value)


def test_a_cut_cable_fails_what_needs_it_by_its_deadline_and_serves_again_once_it_heals(cables: Bed, put: Put) -> None:
    first, second = cables
    near, far = (put(host, name, BOTH, transfer_timeout=2.0) for host, name in ((first, "near"), (second, "far")))
    meet(near, far)
    check_moves(near, far, "far", seed=40)
    cables.cut(second, rail=1)
    with pytest.raises((TransferTimeout, PeerLost)):
        near.ask("copy", "read", "one", "far", "one")
    cables.heal(second, rail=1)
    check_moves(near, far, "far", seed=50)
