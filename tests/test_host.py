"""What the host says of itself and of its processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from agent_tools import PATIENCE, eventually

from raynixl.host import host_identity, is_ending, is_frozen, process_state

pytestmark = pytest.mark.pure


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process with an awkward name that sleeps until it is killed."""
    code = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b') T (', 0, 0, 0); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_the_identity_is_the_same_for_every_process_of_the_host() -> None:
    code = "from raynixl.host import host_identity; print(host_identity())"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert other.stdout.strip() == host_identity()


def test_a_stopped_process_is_frozen_until_it_goes_on(child: subprocess.Popen[bytes]) -> None:
    assert not is_frozen(child.pid)
    child.send_signal(signal.SIGSTOP)
    eventually(lambda: is_frozen(child.pid), "the process to stop")
    child.send_signal(signal.SIGCONT)
    eventually(lambda: not is_frozen(child.pid), "the process to go on")


def test_a_dead_process_is_a_zombie_and_then_nothing(child: subprocess.Popen[bytes]) -> None:
    assert process_state(child.pid) in ("R", "S", "D")
    assert not is_ending(child.pid)
    child.kill()
    eventually(lambda: process_state(child.pid) == "Z", "the process to die")
    assert not is_frozen(child.pid)
    child.wait(PATIENCE)
    assert process_state(child.pid) == ""
    assert is_ending(child.pid)


def test_one_that_never_was_is_nothing() -> None:
    assert process_state(2**22 + 1) == ""
    assert process_state(os.getpid()) == "R"


def test_whose_socket_has_closed_by_its_death_is_ending_from_then_on() -> None:
    """Sockets close before the process is a zombie: whoever hears the socket must not take it for alive."""
    for _ in range(20):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            code = "import sys; sys.stdin.read()"
            with subprocess.Popen(
                [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, pass_fds=[theirs.fileno()]
            ) as one:
                theirs.close()
                one.kill()
                assert ours.recv(1) == b""
                assert is_ending(one.pid)
