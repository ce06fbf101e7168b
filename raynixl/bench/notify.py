"""The notification benchmark: one there and one back between two processes, against a bare Unix socket."""

from __future__ import annotations

import base64
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import numpy as np

from raynixl.agents import Agent
from raynixl.bench.names import check_baselines
from raynixl.bench.process import TargetProcess
from raynixl.bench.timing import Nanoseconds, median_us, percentile_us, quiet, rounded
from raynixl.config import from_env
from raynixl.errors import IntegrityError, PeerLost

Row = dict[str, Any]
Bounce = Callable[[bytes], bytes]
BASELINES = ("socket",)
WAIT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class NotifySpec:
    """What to measure: round trips of `nbytes`, after a pause of both processes and without one."""

    trips: int = 2000
    nbytes: int = 8
    pause_ms: float = 2.0
    baselines: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what cannot be measured."""
        check_baselines(self.baselines, BASELINES)


def run_notify(spec: NotifySpec, step: Callable[[], None] = lambda: None) -> Iterator[Row]:
    """Yield the rows of both pauses for ours and each baseline, measured in turn in ten rounds."""
    spec.check()
    with ExitStack() as stack:
        target = stack.enter_context(TargetProcess())
        bounces: dict[str, Bounce] = {"raynixl": _agents(stack, target)}
        if "socket" in spec.baselines:
            bounces["socket"] = _sockets(stack, target)
        for pause in (0.0, spec.pause_ms / 1e3):
            times: dict[str, list[int]] = {impl: [] for impl in bounces}
            for number in range(11):  # the first warms up
                for impl, bounce in bounces.items():
                    sample = _sample(bounce, spec.nbytes, max(1, spec.trips // 10), pause)
                    times[impl] += sample if number else []
                step()
            yield from (_row(impl, spec, pause, np.array(each, np.int64)) for impl, each in times.items())


def _agents(stack: ExitStack, target: TargetProcess) -> Bounce:
    name = f"bench-{os.getpid()}"
    agent = stack.enter_context(Agent(name, config=from_env()))
    made = target.ask("agent", name=f"bench-target-{os.getpid()}", config={"backends": ("shm",)})
    peer = agent.peer(base64.b64decode(made["record"]))
    peer.connect()
    target.ask("echo", peer=name)

    def bounce(payload: bytes) -> bytes:
        agent.notify(peer.name, payload)
        return agent.wait_notification(WAIT_SECONDS).payload

    return bounce


def _sockets(stack: ExitStack, target: TargetProcess) -> Bounce:
    address = f"\0raynixl-bench/{secrets.token_hex(16)}"
    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    listener.bind(address)
    listener.listen(1)
    listener.settimeout(WAIT_SECONDS)
    target.ask("socket_echo", address=address)
    sock = stack.enter_context(listener.accept()[0])
    sock.settimeout(WAIT_SECONDS)

    def bounce(payload: bytes) -> bytes:
        sock.send(payload)
        data = sock.recv(1 << 16)
        if not data:
            raise PeerLost("the target process is gone", hint="run the command again", peer="target")
        return data

    return bounce


def _sample(bounce: Bounce, nbytes: int, count: int, pause: float) -> list[int]:
    times = []
    with quiet():
        for number in range(count):
            payload = number.to_bytes(8, "little").ljust(nbytes, b".")
            if pause:
                time.sleep(pause)
            start = perf_counter_ns()
            answer = bounce(payload)
            times.append(perf_counter_ns() - start)
            if answer != payload:
                raise IntegrityError("a notification came back changed", hint="this is a bug: report it")
    return times


def _row(impl: str, spec: NotifySpec, pause: float, times: Nanoseconds) -> Row:
    return {
        "bench": "notify",
        "impl": impl,
        "nbytes": max(8, spec.nbytes),
        "pause_ms": pause * 1e3,
        "trips": len(times),
        "p50_us": rounded(median_us(times)),
        "p99_us": rounded(percentile_us(times, 99)),
        "verified": True,
    }
