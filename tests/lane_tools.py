"""Real processes whose agents reach each other over UCX only, by one lane or another."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

from agent_tools import PATIENCE
from link_tools import End
from liveness_tools import QUICK, World

from raynixl import Agent, AgentConfig, RaynixlError, Region, RemoteRegion, Transfer
from raynixl.backends.greeting import greet
from raynixl.backends.listener import dial
from raynixl.backends.stream_link import StreamLink
from raynixl.backends.ucx import UcxBackend
from raynixl.backends.wire import StreamWire
from raynixl.record import AgentRecord
from raynixl.testing.places import FarProcess

CMA, TCP = LANES = ("cma,tcp", "tcp")
SECRET = b"of this job"
NOTICE_SECONDS = {CMA: 0.1, TCP: 1.0}
"""How long the death of a peer may stay unnoticed on a machine of one's own."""
BUSY_FACTOR = 10
"""How much longer it may take on a machine that others share."""


def config_for(tls: str, **changes: Any) -> AgentConfig:
    """A configuration with short deadlines for one lane."""
    return QUICK.model_copy(update={"backends": ("ucx",), "ucx": {"TLS": tls}, **changes})


def end_of(transfer: Transfer) -> type[RaynixlError] | None:
    """Wait for the end of a transfer; return how it failed, None if it did not."""
    try:
        transfer.wait(PATIENCE)
    except RaynixlError as exc:
        return type(exc)
    return None


class LaneWorld(World):
    """Near, victim and bystander, which reach each other by the same lane."""

    def __init__(self, config: AgentConfig) -> None:
        self.tls = config.ucx["TLS"]
        super().__init__(UcxBackend, config)

    def open(self, far: FarProcess, name: str) -> None:
        """Start an agent in a process; the bystander not before it is needed: UCX takes a second of a core."""
        if far is self.bystander:
            return
        far.open(name)
        self.introduce(far)

    def meet_bystander(self) -> None:
        """Start the bystander, and exchange a message with it."""
        self.bystander.open("bystander")
        self.introduce(self.bystander)
        self.check_bystander()

    def introduce(self, far: FarProcess) -> None:
        """Make a far agent and the near one known to each other."""
        self.near.peer(far.ask("record"))
        far.ask("meet", self.near.record())

    def gigabytes(self, op: str, mine: Region, theirs: RemoteRegion) -> list[Transfer]:
        """Start to move the same regions again and again: more than will be through before anything happens."""
        source, target = (theirs, mine) if op == "read" else (mine, theirs)
        plan = self.near.prepare(op, source, target)
        plan.post(timeout=PATIENCE).wait()
        return [plan.post(timeout=60.0) for _ in range((4 << 30) // mine.nbytes)]

    def until_it_fails(self, op: str, mine: Region, theirs: RemoteRegion) -> Future[RaynixlError]:
        """Move the same regions one transfer after the other in a thread; its result is how the last one failed."""
        plan = self.near.prepare(op, *((theirs, mine) if op == "read" else (mine, theirs)))
        failure: Future[RaynixlError] = Future()

        def move() -> None:
            try:
                while True:
                    plan.post(timeout=60.0).wait(PATIENCE)
            except RaynixlError as exc:
                failure.set_result(exc)
            except BaseException as exc:  # noqa: BLE001 - handed to the one who waits
                failure.set_exception(exc)

        threading.Thread(target=move, daemon=True).start()
        return failure


class RudePeer(End):
    """An end that knows how to become an agent's peer, and then says what it likes."""

    def meet_agent(self, agent: Agent) -> StreamLink:
        """Connect to an agent and prove ourselves; it has taken us in afterwards."""
        record = AgentRecord.from_bytes(agent.record())
        deadline = time.monotonic() + PATIENCE
        sock = dial([endpoint_of(agent)], peer=record.name, deadline=deadline)
        try:
            greet(self.local, StreamWire(sock), record, probe=0, deadline=deadline)
        except BaseException:
            sock.close()
            raise
        return self._open(sock, record.name, record.incarnation)


def endpoint_of(agent: Agent) -> tuple[str, int]:
    """Where an agent is heard by peers on the network."""
    backend: Any = agent.backend("ucx")
    return next(one for one in backend._listener.endpoints if one[0] == "127.0.0.1")


def noticed_in(seconds: float, tls: str, what: str) -> None:
    """Report how soon a death was noticed, and check it with a bound that a busy machine keeps."""
    print(f"{what} over {tls}: noticed in {1000 * seconds:.1f} ms")
    assert seconds < BUSY_FACTOR * NOTICE_SECONDS[tls], f"{what}: {seconds:.3f} s"
