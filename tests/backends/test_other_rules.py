"""Processes that other rules apply to: of another user, without process_vm, of another version."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
from agent_tools import make_agent

from raynixl import Agent, ConfigError
from raynixl.backends.greeting import GREETING_VERSION, greet
from raynixl.backends.wire import PacketWire
from raynixl.record import AgentRecord

PEER = """
import ctypes, struct, sys
import numpy as np
from raynixl import Agent, RaynixlError
record, rule = bytes.fromhex(sys.argv[1]), sys.argv[2]

def another_user():
    import os
    Agent("first").close()  # imports all that the new user may not be allowed to read
    os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else /proc/self stays root's

def no_process_vm():
    allow, refuse = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | EPERM
    code = [(0x20, 0, 0, 0), (0x15, 1, 0, 310), (0x15, 0, 1, 311), (0x06, 0, 0, refuse), (0x06, 0, 0, allow)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("H6xQ", len(code), ctypes.addressof(filters))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.create_string_buffer(program), 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP

globals()[rule]()
with Agent("peer") as agent:
    peer = agent.peer(record)
    for name in ("plain", "arena"):
        try:
            mine = agent.register(np.zeros(64, np.uint8))
            agent.read(peer[name], mine).wait(10)
            print("read", int(mine.array().sum()), flush=True)
        except RaynixlError as exc:
            print(type(exc).__name__, exc, flush=True)
"""


@pytest.fixture
def owner(nothing_left: Callable[[], list[str]]) -> Agent:
    """An agent with an arena and plain memory, full of ones."""
    with make_agent("owner", backends=("shm",)) as agent:
        agent.empty(64, name="arena").array()[:] = 1
        agent.register(np.ones(64, np.uint8), name="plain")
        yield agent


def ask(owner: Agent, rule: str) -> list[str]:
    """What a process under a rule says of reading plain memory and an arena."""
    command = [sys.executable, "-c", PEER, owner.record().hex(), rule]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_without_a_secret_another_user_gets_nothing(owner: Agent) -> None:
    plain, arena = ask(owner, "another_user")
    assert plain.startswith("ConfigError peer 'owner' belongs to another user")
    assert arena == plain


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter names system calls of x86-64")
def test_where_process_vm_is_forbidden_arenas_work_and_the_rest_says_why(owner: Agent) -> None:
    plain, arena = ask(owner, "no_process_vm")
    assert plain.startswith("BackendUnavailable")
    assert "process_vm does not work here" in plain
    assert arena == "read 64"


def test_another_version_is_named_whatever_else_it_says(owner: Agent) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as newer:
        newer.connect(f"\0raynixl/{owner.incarnation}")
        newer.settimeout(10)
        newer.send(json.dumps({"version": GREETING_VERSION + 1, "colour": "blue"}).encode())
        verdict = newer.recv(4096)
        assert json.loads(verdict)["kind"] == "version"
        theirs.send(verdict)  # what the newer one's client would hear
        record = AgentRecord.from_bytes(owner.record())
        with pytest.raises(ConfigError, match="another version"):
            greet(owner.backends[0]._local, PacketWire(ours), record, probe=0, deadline=time.monotonic() + 10)
