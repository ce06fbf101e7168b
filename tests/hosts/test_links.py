"""TCP links between hosts: which address is taken, and what becomes of a link when its cable is cut."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts_tools import PATIENCE, Bed, Host, environment

pytestmark = pytest.mark.pure

LONG = 30.0  # a heartbeat that no test waits for
CODE = Path(__file__).parent / "link_end.py"


class HostedEnd:
    """The near side of an end in a host."""

    def __init__(self, host: Host, hosts: list[str], heartbeat_timeout: float) -> None:
        self._process = host.run_warm(
            [sys.executable, str(CODE), host.name, ",".join(hosts), str(heartbeat_timeout)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        self.introduction = self.ask("introduce")

    def ask(self, do: str, **fields: Any) -> Any:
        """Have it do one thing; an error is an assertion here."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self._process.stdin.flush()
        answer, error = json.loads(self._process.stdout.readline())
        assert not error, error
        return answer

    def connect(self, other: HostedEnd, timeout: float = PATIENCE) -> str:
        """Connect; the address that was taken."""
        return str(self.ask("connect", **other.introduction, timeout=timeout))

    def close(self) -> None:
        """End the process, gently if it can."""
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.wait(PATIENCE)


Put = Callable[..., HostedEnd]


@pytest.fixture
def put(bed: Bed, nothing_left: Callable[[], list[str]]) -> Iterator[Put]:
    """Put ends on hosts; each listens on every address of its host: put(host, heartbeat_timeout=...)."""
    made: list[HostedEnd] = []

    def start(host: Host, heartbeat_timeout: float = LONG) -> HostedEnd:
        rails = range(bed.rails)
        addresses = [*map(host.address_on, rails), *map(host.address6_on, rails)]
        made.append(HostedEnd(host, addresses, heartbeat_timeout))
        return made[-1]

    yield start
    for end in made:
        end.close()


def check_carries(one: HostedEnd, other: HostedEnd) -> None:
    """Messages arrive whole, in order, in both directions."""
    for sender, hearer in ((one, other), (other, one)):
        sent = [sender.ask("send", text=text, times=times) for text, times in (("short", 1), ("long", 1 << 20))]
        assert hearer.ask("heard", count=2, timeout=PATIENCE)[-2:] == sent


def test_messages_travel_between_hosts_whatever_their_size(bed: Bed, put: Put) -> None:
    first, second = bed
    one, other = put(first), put(second)
    assert [host for host, _ in other.introduction["endpoints"]] == [second.address, second.address6_on(0)]
    assert one.connect(other) == second.address
    check_carries(one, other)


def test_ipv6_carries_when_it_comes_first(bed: Bed, put: Put) -> None:
    first, second = bed
    one, other = put(first), put(second)
    other.introduction["endpoints"].reverse()
    assert one.connect(other) == second.address6_on(0)
    check_carries(one, other)


def test_an_address_behind_a_cut_cable_does_not_eat_the_deadline(bed: Bed, put: Put) -> None:
    first, second = bed
    bed.second_rail()
    one, other = put(first), put(second)
    bed.cut(second, rail=0)
    taken = one.connect(other, timeout=5.0)
    assert taken in (second.address_on(1), second.address6_on(1))
    check_carries(one, other)


def test_a_host_that_no_cable_reaches_is_reported_in_time_with_every_address(bed: Bed, put: Put) -> None:
    first, second = bed
    one, other = put(first), put(second)
    bed.cut(second)
    with pytest.raises(AssertionError, match=r"TransferTimeout.*10\.77\.0\.2 .*no answer.*fd77:1::2 .*no answer"):
        one.connect(other, timeout=1.0)
    bed.heal(second)
    one.connect(other)
    check_carries(one, other)


@pytest.mark.parametrize("has_unsent", [False, True], ids=["idle", "with a message under way"])
def test_a_cut_cable_ends_the_link_on_both_sides(bed: Bed, put: Put, has_unsent: bool) -> None:
    first, second = bed
    one, other = put(first, heartbeat_timeout=1.0), put(second, heartbeat_timeout=1.0)
    one.connect(other)
    check_carries(one, other)
    bed.cut(first)
    if has_unsent:
        one.ask("send", text="lost", times=1 << 20)
    for end, peer in ((one, "h2"), (other, "h1")):
        (said,) = end.ask("lost", timeout=PATIENCE)
        assert said.startswith(f"PeerLost: the host of peer '{peer}' has not answered for"), said
    bed.heal(first)
    one.connect(other)
    one.ask("send", text="again", times=1)


def test_a_link_outlives_a_cut_that_is_shorter_than_the_heartbeat(bed: Bed, put: Put) -> None:
    first, second = bed
    one, other = put(first, heartbeat_timeout=LONG), put(second, heartbeat_timeout=LONG)
    one.connect(other)
    check_carries(one, other)
    bed.cut(first)
    sent = one.ask("send", text="while it was cut ", times=1 << 16)
    assert one.ask("lost", timeout=1.0) == []
    bed.heal(first)
    assert other.ask("heard", count=3, timeout=PATIENCE)[-1] == sent
    assert other.ask("lost", timeout=0.01) == []


def test_a_host_that_vanishes_ends_the_links_of_its_peers_only(put: Put, bed: Bed) -> None:
    first, second = bed
    one, other, bystander = put(first, 1.0), put(second, 1.0), put(first, 1.0)
    one.connect(other)
    bystander.connect(one)
    second.close()
    (said,) = one.ask("lost", timeout=PATIENCE)
    assert said.startswith("PeerLost"), said
    assert bystander.ask("lost", timeout=0.01) == []
    sent = bystander.ask("send", text="still here", times=1)
    assert one.ask("heard", count=1, timeout=PATIENCE) == [sent]
