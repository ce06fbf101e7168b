"""Whoever reaches an agent's TCP port without the job's secret gets nothing, is counted, and disturbs nobody."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from agent_tools import PATIENCE, eventually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from link_tools import SECRET, End, TcpStranger, framed

from raynixl import ConfigError, PeerLost, PeerRestarted, TransferTimeout
from raynixl.backends import greeting

pytestmark = [pytest.mark.pure, pytest.mark.usefixtures("nothing_left")]
CONNECTIONS = 10_000


@pytest.fixture
def end(nothing_left: Callable[[], list[str]]) -> Iterator[End]:
    """An end with a secret."""
    with End("guarded", secret=SECRET) as made:
        yield made


@pytest.fixture
def friend(nothing_left: Callable[[], list[str]]) -> Iterator[End]:
    """An end that knows the secret."""
    with End("friend", secret=SECRET) as made:
        yield made


def check_serves(end: End, friend: End) -> None:
    """An honest peer gets in and is heard."""
    link, far = friend.meet(end)
    link.send(b"I know the secret")
    eventually(lambda: end.heard == [b"I know the secret"], "the message")
    end.heard.clear()
    link.close()
    eventually(lambda: far.lost, "the other end to hear of it")


def refused(stranger: TcpStranger, reason: str) -> None:
    """They say why, hang up, and have counted it."""
    verdict = stranger.hear()
    assert verdict.get("refusal") == reason, verdict
    assert stranger.hear() == {}
    eventually(lambda: stranger.agent.dropped[f"greeting: {reason}"], "the count")
    assert not stranger.agent.opened


def test_a_stranger_who_knows_nothing_hears_no_more_than_a_challenge(end: End, friend: End) -> None:
    with TcpStranger(end) as stranger:
        challenge = stranger.challenge()
        assert SECRET.decode() not in str(challenge)
        stranger.say({"proof": "00" * 32, "probe": 0})
        refused(stranger, "wrong secret")
    check_serves(end, friend)


def test_a_wrong_secret_is_refused(end: End) -> None:
    with TcpStranger(end) as stranger:
        stranger.say({"proof": stranger.proof(stranger.challenge(), b"of another job"), "probe": 0})
        refused(stranger, "wrong secret")


def test_a_replayed_greeting_is_refused(end: End) -> None:
    with TcpStranger(end) as friend:
        challenge = friend.challenge()
        hello, answer = friend.hello(), {"proof": friend.proof(challenge, SECRET), "probe": 0}
        friend.say(answer)
        assert friend.hear()["refusal"] == ""
    with TcpStranger(end) as stranger:
        stranger.say(hello)
        assert stranger.hear()["nonce"] != challenge["nonce"]
        stranger.say(answer)
        assert stranger.hear()["kind"] == "secret"
    with TcpStranger(end) as stranger:  # all of it in one go
        stranger.sock.sendall(framed(json.dumps(hello).encode()) + framed(json.dumps(answer).encode()))
        assert stranger.hear()["nonce"] != challenge["nonce"]
        assert stranger.hear()["kind"] == "secret"


def test_a_proof_reflected_is_refused(end: End) -> None:
    with TcpStranger(end) as stranger:
        stranger.say({"proof": stranger.challenge()["proof"], "probe": 0})
        refused(stranger, "wrong secret")


def test_a_greeting_for_another_incarnation_or_version_is_refused(end: End, friend: End) -> None:
    with TcpStranger(end) as stranger:
        stranger.say(stranger.hello(target="0" * 32))
        refused(stranger, "another incarnation")
    with TcpStranger(end) as stranger:
        stranger.say({"version": greeting.GREETING_VERSION + 1, "colour": "blue"})
        refused(stranger, "version")
    with pytest.raises(PeerRestarted):
        friend.connect(end.record.model_copy(update={"incarnation": "0" * 32}), [end.endpoint])


def test_ends_of_two_jobs_are_told_so_on_both_sides(end: End) -> None:
    with End("foreign", secret=b"of another job") as foreign:
        for one, other in ((foreign, end), (end, foreign)):
            with pytest.raises(ConfigError, match="does not share our secret"):
                one.connect(other.record, [other.endpoint])
    with End("open") as bare, pytest.raises(ConfigError, match="does not share our secret"):
        bare.connect(end.record, [end.endpoint])


STRANGER_OF_ANOTHER_USER = """
import sys
from link_tools import End
from raynixl.record import AgentRecord
import os
from raynixl import ConfigError
with End("first"): pass  # imports all that the new user may not be allowed to read
os.setresuid(65534, 65534, 65534)
with End("alien", hosts=("127.0.0.1",)) as end:
    try:
        end.connect(AgentRecord.from_bytes(bytes.fromhex(sys.argv[1])), [("127.0.0.1", int(sys.argv[2]))])
    except ConfigError as exc:
        print(exc)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_without_a_secret_another_user_gets_nothing() -> None:
    with End("open") as end:
        command = [
            sys.executable, "-c", STRANGER_OF_ANOTHER_USER, end.record.to_bytes().hex(), str(end.endpoint[1])
        ]  # fmt: skip
        env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))}
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env).stdout
        assert said.startswith("peer 'open' belongs to another user")
        assert end.dropped["greeting: another user"] == 1
        with End("same") as same:
            same.meet(end)


GARBAGE = st.one_of(
    st.binary(min_size=1, max_size=200),
    st.binary(min_size=1, max_size=300).map(framed),
    st.binary(min_size=greeting.MAX_GREETING_NBYTES, max_size=greeting.MAX_GREETING_NBYTES).map(framed),
    st.dictionaries(
        st.sampled_from(["version", "target", "name", "incarnation", "nonce", "proof", "probe", "x"]),
        st.one_of(st.integers(), st.text(max_size=20), st.none(), st.lists(st.integers(), max_size=3), st.booleans()),
    ).map(lambda words: framed(json.dumps(words).encode())),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(garbage=st.lists(GARBAGE, min_size=1, max_size=3), is_greeted=st.booleans())
def test_garbage_is_turned_away_and_counted(end: End, garbage: list[bytes], is_greeted: bool) -> None:
    before = sum(end.dropped.values())
    with TcpStranger(end) as stranger, contextlib.suppress(OSError):
        if is_greeted:
            assert stranger.challenge()
        for one in garbage:
            stranger.sock.sendall(one)
        stranger.sock.shutdown(socket.SHUT_WR)
        while stranger.sock.recv(4096):
            continue
    eventually(lambda: sum(end.dropped.values()) == before + 1, "the count of one more")
    assert not end.opened


FLOOD = """
import random, socket, sys
target, connections = (sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
chance = random.Random(connections)
for _ in range(connections):
    with socket.socket() as sock:
        try:
            sock.connect(target)
            sock.send(chance.randbytes(chance.randint(1, 300)))
            if chance.random() < 0.1:
                sock.settimeout(0.01)
                sock.recv(1)
        except OSError:
            pass
"""


def test_ten_thousand_connections_of_random_bytes_are_borne(
    end: End, friend: End, nothing_left: Callable[[], list[str]]
) -> None:
    held = len(nothing_left())
    host, port = end.endpoint
    flooder = subprocess.Popen([sys.executable, "-ISc", FLOOD, host, str(port), str(CONNECTIONS)])
    meetings = 0
    while flooder.poll() is None:
        check_serves(end, friend)
        meetings += 1
        time.sleep(0.01)
    assert flooder.wait(PATIENCE) == 0
    assert meetings > 0
    eventually(lambda: sum(end.dropped.values()) >= CONNECTIONS, "all of them to be counted")
    check_serves(end, friend)
    eventually(lambda: len(nothing_left()) <= held, "their descriptors to be closed")
    assert sum(end.dropped.values()) == CONNECTIONS


def test_hundreds_of_half_open_connections_keep_nobody_out(end: End, friend: End) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(greeting.MAX_STRANGERS + 50):
            stranger = stack.enter_context(TcpStranger(end))
            if number % 2:
                assert stranger.challenge()
        check_serves(end, friend)
        eventually(lambda: sum(end.dropped.values()) >= 50, "the count of those turned away")
    eventually(lambda: sum(end.dropped.values()) >= greeting.MAX_STRANGERS, "the count of those who hung up")


def test_a_stranger_who_says_nothing_is_sent_away(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREETING_TIMEOUT", 0.05)
    with TcpStranger(end) as stranger:
        refused(stranger, "timeout")


def test_a_stranger_who_drips_gains_no_time(end: End, friend: End, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREETING_TIMEOUT", 0.2)
    with TcpStranger(end) as stranger, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        check_serves(end, friend)
        for byte in framed(bytes(4000)):
            stranger.sock.send(bytes([byte]))
            if end.dropped["greeting: timeout"]:
                break
            time.sleep(0.002)
    assert end.dropped["greeting: timeout"] == 1


def test_one_who_sends_his_greeting_byte_by_byte_gets_in(end: End) -> None:
    with TcpStranger(end) as friend:

        def drip(words: dict[str, object]) -> None:
            for byte in framed(json.dumps(words).encode()):
                friend.sock.send(bytes([byte]))

        drip(friend.hello())
        drip({"proof": friend.proof(friend.hear(), SECRET), "probe": 0})
        assert friend.hear() == {"refusal": "", "kind": ""}
        eventually(lambda: end.opened, "the link")


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_stranger_who_leaves_within_the_greeting_leaves_nothing(
    end: End, friend: End, nothing_left: Callable[[], list[str]], is_reset: bool
) -> None:
    held = len(nothing_left())
    for turn in range(30):
        with TcpStranger(end) as stranger:
            if turn % 3:
                challenge = stranger.challenge()
                if turn % 3 == 2:
                    stranger.say({"proof": stranger.proof(challenge, SECRET), "probe": 0})
            if is_reset:
                stranger.reset()
    eventually(lambda: len(nothing_left()) <= held, "their descriptors to be closed")
    check_serves(end, friend)


@contextlib.contextmanager
def impostor(answer: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """Somebody who listens and answers in their own way."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE)

        def serve() -> None:
            with server.accept()[0] as sock, contextlib.suppress(OSError):
                sock.settimeout(PATIENCE)
                answer(sock)
                while sock.recv(4096):
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()
        finally:
            thread.join(PATIENCE)


def drips_for_ever(sock: socket.socket) -> None:
    """Send a greeting that never ends."""
    for byte in framed(bytes(4000)):
        sock.send(bytes([byte]))
        time.sleep(0.005)


def reflects(sock: socket.socket) -> None:
    """Send back what comes."""
    sock.sendall(sock.recv(4096))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda sock: None, TransferTimeout),
        (drips_for_ever, TransferTimeout),
        (lambda sock: sock.shutdown(socket.SHUT_RDWR), PeerLost),
        (lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), PeerLost),
        (lambda sock: sock.sendall(framed(b"{}")), PeerLost),
        (lambda sock: sock.sendall(framed(b"\xff" * 4096)), PeerLost),
        (reflects, PeerLost),
    ],
    ids=["silent", "drips", "hangs up", "http", "empty", "binary", "reflects"],
)
def test_an_impostor_is_an_error_in_time(
    friend: End, answer: Callable[[socket.socket], None], error: type[Exception]
) -> None:
    timeout = 0.4 if error is TransferTimeout else PATIENCE
    with impostor(answer) as target, pytest.raises(error):
        friend.connect(friend.record.model_copy(update={"name": "impostor"}), [target], timeout)
    assert not friend.links._links
