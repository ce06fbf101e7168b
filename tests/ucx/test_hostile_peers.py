"""A peer that has proved itself and then sends what no agent sends: counted, typed, and no process comes to harm."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from agent_tools import PATIENCE, error_of, eventually, introduce, random_bytes
from lane_tools import RudePeer, config_for

from raynixl import Agent, IntegrityError, RaynixlError, RegionStale, TransferTimeout
from raynixl.backends import ucx_answers
from raynixl.backends.ucx_key import Keys, seal_workers
from raynixl.backends.ucx_wireup import MAX_WIREUP_NBYTES, Answer, Ask, pack
from raynixl.host import host_identity

N = 4096
HUGE = 2**64


def said(**words: Any) -> bytes:
    """A message of the backend."""
    return json.dumps(words).encode()


HELLO = said(kind="hello", host="elsewhere", pid=1)
FRAMES = {
    "empty": b"",
    "no object": b"{}",
    "binary": b"\xff\x00" * 50,
    "deep": b"[" * 100_000,
    "long": b" " * (MAX_WIREUP_NBYTES + 1),
    "unknown kind": said(kind="tell", number=1),
    "more than it says": said(kind="ask", number=1, region=1, more=1),
    "negative": said(kind="ask", number=-1, region=1),
    "huge number": said(kind="ask", number=HUGE, region=1),
    "huge region": said(kind="ask", number=1, region=10**40),
    "text for a number": said(kind="ask", number="1", region=1),
    "fraction": said(kind="ask", number=1.5, region=1),
    "no number": said(kind="ask", number=float("nan"), region=1),
    "huge process": said(kind="hello", host=host_identity(), pid=2**63),
    "no process": said(kind="hello", host=host_identity(), pid=0),
    "long host": said(kind="hello", host="h" * 1000, pid=1),
    "addresses that are none": said(kind="hello", host="h", pid=1, addresses=["here"]),
    "too many addresses": said(kind="hello", host="h", pid=1, addresses=["10.0.0.1"] * 1000),
    "workers in a list": said(kind="answer", number=1, sealed="", workers=[""], window=0),
    "key of a megabyte": said(kind="answer", number=1, sealed="A" * 800_000, workers="", window=0),
    "error with no text": said(kind="refusal", number=1, error="PeerLost", message=None),
}


@pytest.fixture
def pair(tls: str, _leaves_nothing: None) -> Iterator[tuple[Agent, Agent]]:
    """Two agents of this process that know each other."""
    with Agent("alice", config=config_for(tls)) as alice, Agent("bob", config=config_for(tls)) as bob:
        introduce(alice, bob)
        bob.register(random_bytes(N), name="bobs")
        yield alice, bob


def check_reads(alice: Agent) -> None:
    """Alice reads what Bob has."""
    mine = alice.register(np.zeros(N, np.uint8))
    alice.read(alice.peer("bob")["bobs"], mine, timeout=PATIENCE).wait()
    assert np.array_equal(mine.array(), random_bytes(N))
    alice.deregister(mine)


def test_frames_that_no_agent_sends_end_the_link_and_are_counted(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    check_reads(alice)
    for number, (case, body) in enumerate(FRAMES.items(), 1):
        with RudePeer("rude") as rude:
            link = rude.meet_agent(bob)
            link.send_control(HELLO)
            link.send_control(body)
            eventually(lambda: rude.lost, f"the end of the link: {case}")
        assert bob.statistics().dropped["frame"] == number, case
    check_reads(alice)


def test_well_formed_nonsense_is_answered_or_counted_and_the_link_stands(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    with RudePeer("rude") as rude:
        link = rude.meet_agent(bob)
        bodies = [
            HELLO, HELLO, said(kind="hello", host=host_identity(), pid=os.getpid()),
            said(kind="answer", number=2**63 - 1, sealed="!!!", workers="", window=0),
            said(kind="refusal", number=5, error="SystemExit", message="", hint=""),
            said(kind="ask", number=2**63 - 1, region=2**63 - 1),
            said(kind="ask", number=2**63 - 1, region=10**9),
        ]  # fmt: skip
        for body in bodies:
            link.send_control(body)
        eventually(lambda: len(rude.controls) >= 3 or rude.lost, "a hello and two refusals")
        assert not rude.lost
        refusals = [json.loads(body) for body in rude.controls[1:]]
        assert [one["error"] for one in refusals] == ["RegionStale", "RegionStale"]
        assert bob.statistics().dropped["late answer"] == 2
        assert link.lost is None
        check_reads(alice)


def test_one_who_asks_without_end_and_never_listens_holds_nobody_up(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    check_reads(alice)
    with RudePeer("rude") as rude:
        link = rude.meet_agent(bob)
        link.send_control(HELLO)
        rude.reactor.remove(link._fd)
        for number in range(1, 20_001):
            link.send_control(Ask(number=number, region=1).model_dump_json().encode())
        check_reads(alice)
        link.close()
    check_reads(alice)


def altered(sealed: bytes, at: int) -> str:
    """Sealed bytes with one of them changed, as they travel."""
    changed = bytearray(sealed)
    changed[at % len(sealed)] ^= 0xFF
    return pack(bytes(changed))


def sealed_for(bob: Agent, region: int) -> Keys:
    """The keys that Bob gives out, opened."""
    backend: Any = bob.backend("ucx")
    nbytes = bob.regions.by_id(region).nbytes if region else 32
    return Keys.unseal(
        backend.network.exports._mapped(region).sealed, incarnation=bob.incarnation, region=region, nbytes=nbytes
    )


Lie = Callable[[Agent, Answer], dict[str, str]]
LIES: dict[str, Lie] = {
    "a key altered at its start": lambda bob, _: {"sealed": altered(sealed_for(bob, 1).seal(), 0)},
    "a key altered within": lambda bob, _: {"sealed": altered(sealed_for(bob, 1).seal(), 70)},
    "a key altered at its end": lambda bob, _: {"sealed": altered(sealed_for(bob, 1).seal(), -1)},
    "no key": lambda *_: {"sealed": ""},
    "no base64": lambda *_: {"sealed": "~~~"},
    "a key of another region": lambda bob, _: {"sealed": pack(sealed_for(bob, 0).seal())},
    "a key of another incarnation": lambda bob, _: {
        "sealed": pack(Keys("ab" * 16, 1, 4096, N, sealed_for(bob, 1).packed).seal())
    },
    "a key of a longer region": lambda bob, _: {
        "sealed": pack(Keys(bob.incarnation, 1, 4096, 2 * N, sealed_for(bob, 1).packed).seal())
    },
    "no worker": lambda *_: {"workers": ""},
    "a worker of random bytes": lambda *_: {"workers": pack(os.urandom(200))},
    "a worker that is not sealed": lambda bob, _: {"workers": pack(bob.backend("ucx").network.worker_addresses()[0])},  # type: ignore[attr-defined]
    "a worker altered within": lambda bob, _: {
        "workers": altered(seal_workers(bob.incarnation, [os.urandom(100)]), 80)
    },
    "a worker of another incarnation": lambda *_: {"workers": pack(seal_workers("ab" * 16, [os.urandom(100)]))},
}


def test_keys_and_workers_that_lie_are_refused_before_ucx_sees_them(
    pair: tuple[Agent, Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob = pair
    mine, theirs = alice.register(np.zeros(N, np.uint8)), alice.peer("bob")["bobs"]
    reply = ucx_answers.Answers._reply
    for case, lie in LIES.items():

        def tell(answers: Any, link: Any, answer: Answer, lie: Lie = lie) -> None:
            reply(answers, link, answer.model_copy(update=lie(bob, answer)))

        with monkeypatch.context() as patch:
            patch.setattr(ucx_answers.Answers, "_reply", tell)
            assert isinstance(error_of(alice.read(theirs, mine)), IntegrityError), case
        assert not mine.array().any()
    assert alice.lost("bob") is None
    check_reads(alice)


def test_a_peer_that_does_not_answer_or_says_no_is_a_typed_error(
    pair: tuple[Agent, Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, _ = pair
    mine, theirs = alice.register(np.zeros(N, np.uint8)), alice.peer("bob")["bobs"]
    cases: list[tuple[Callable[..., None], type[RaynixlError]]] = [
        (lambda self, link, ask: self._refuse(link, ask, RegionStale("gone")), RegionStale),
        (lambda self, link, ask: self._refuse(link, ask, RaynixlError("no")), RaynixlError),
        (lambda *_: None, TransferTimeout),
    ]
    for give, kind in cases:
        with monkeypatch.context() as patch:
            patch.setattr(ucx_answers.Answers, "give", give)
            assert type(error_of(alice.read(theirs, mine, timeout=0.5))) is kind
    check_reads(alice)
