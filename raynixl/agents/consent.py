"""Consent: what agents ask each other about their regions: look one up, bind it, let go of it."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from raynixl.agents.connection import Connection, drain_and_release
from raynixl.errors import PeerLost, RaynixlError, RegionStale
from raynixl.messages import Message
from raynixl.native import STALE
from raynixl.record import AgentRecord, RegionRecord, Unsigned, parse
from raynixl.region import MAX_REGION_NBYTES, RemoteRegion, check_descriptor

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent
    from raynixl.agents.control import Control
    from raynixl.backends.base import Link

logger = logging.getLogger(__name__)
_SMALL = 4096
_REGION, _BIND, _GONE, _RECORD = "raynixl.region", "raynixl.bind", "raynixl.gone", "raynixl.record"
_ALL = "all"
_WITHDRAWAL = re.compile(rb"(all|[0-9]{1,20}) ([0-9]{1,6}\.[0-9]{1,6})")  # which region, and the seconds to let go


class _RegionKey(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    id: Unsigned
    generation: Unsigned


class Consent:
    """Asks peers for the use of their regions, and answers when they ask for ours."""

    def __init__(self, agent: Agent, control: Control) -> None:
        self._agent = agent
        self._control = control
        control.answer(_REGION, self._answer_region)
        control.answer(_BIND, self._answer_bind)
        control.answer(_GONE, self._answer_gone)
        control.answer(_RECORD, self._answer_record)

    # What we ask

    def ask_for_region(self, connection: Connection, name: str, deadline: float) -> RemoteRegion:
        """Look a region up by name at its owner, who will tell us when it goes."""
        withdrawals = connection.withdrawals
        payload = self._control.ask(connection, _REGION, name.encode(), left(deadline)).wait()
        what = f"region {name!r} of {connection.name!r}"
        record = parse(RegionRecord, payload, what=what, limit=MAX_REGION_NBYTES)
        region = RemoteRegion(connection.name, connection.incarnation, record)
        connection.remember(name, region, withdrawals)
        return region

    def ask_to_bind(self, connection: Connection, remote: RemoteRegion, deadline: float) -> Sequence[int]:
        """Announce that we shall use a region; return the descriptors that come with the consent.

        The consent carries the region as its owner knows it. A descriptor that says anything else is refused.
        """
        payload = _RegionKey(id=remote.id, generation=remote.generation).model_dump_json().encode()
        reply = self._control.ask(connection, _BIND, payload, left(deadline), takes_fds=True)
        try:
            answer = reply.wait()
        except RegionStale:
            connection.forget_region(remote.id)
            raise
        except BaseException:  # interrupted, too late, or on a thread that must not wait: the answer may come yet
            reply.give_up()
            raise
        try:
            what = f"the consent of {remote.owner!r} to {remote.label}"
            check_descriptor(remote, parse(RegionRecord, answer, what=what, limit=MAX_REGION_NBYTES))
        except RaynixlError:
            reply.give_up()
            raise
        return reply.fds

    def ask_for_record(self, connection: Connection, deadline: float) -> AgentRecord:
        """Return the record of a peer that connected to us."""
        return AgentRecord.from_bytes(self._control.ask(connection, _RECORD, b"", left(deadline)).wait())

    def announce_gone(self, region_id: int, importers: Sequence[Connection], timeout: float) -> list[Connection]:
        """Tell peers that a region goes and wait until they have let go; cut off and return those who do not answer.

        They get half of the time for what they have in flight, and then end it, so that it need not come to that.
        """
        payload, stuck = f"{region_id} {timeout / 2:.6f}".encode(), []
        replies = [self._control.ask(connection, _GONE, payload, timeout) for connection in importers]
        for reply in replies:
            try:
                reply.wait()
            except PeerLost:
                continue
            except RaynixlError as exc:
                name = reply.connection.name
                logger.debug("peer %r did not let go of region %d: %s", name, region_id, exc)
                stuck.append(reply.connection)
                reply.connection.lose(
                    PeerLost(f"peer {name!r} did not let go of a deregistered region in {timeout:g} s", peer=name)
                )
        return stuck

    def announce_end(self, importers: Sequence[Connection], timeout: float) -> list[Connection]:
        """Tell peers that this agent ends, and wait until they have let go; return those of which that is not known.

        Those that are frozen are not waited for: they find their link closed when they go on.
        """
        awake = [connection for connection in importers if connection.is_awake]
        stuck = [connection for connection in importers if connection not in awake]
        payload = f"{_ALL} {timeout / 2:.6f}".encode()
        for reply in [self._control.ask(connection, _GONE, payload, timeout) for connection in awake]:
            try:
                reply.wait()
            except RaynixlError as exc:  # it is gone, or frozen: its connection is about to be closed in any case
                logger.debug("peer %r did not let go of our regions: %s", reply.connection.name, exc)
                if not any(getattr(link, "has_hung_up", False) for link in reply.connection.links):
                    stuck.append(reply.connection)  # who hangs up has let go of everything
        return stuck

    # What we answer, on the reactor's thread

    def _answer_region(self, message: Message, link: Link) -> None:
        region = self._agent.regions.by_name(message.payload.decode(errors="replace"))
        self._agent.regions.add_importer(region.id, link)
        self._control.reply(link, message, region.record().model_dump_json().encode())

    def _answer_bind(self, message: Message, link: Link) -> None:
        key = parse(_RegionKey, message.payload, what="bind request", limit=_SMALL)
        region = self._agent.regions.by_id(key.id)
        if region.generation != key.generation:
            raise RegionStale(f"{region.label} was registered anew")
        self._agent.regions.add_importer(region.id, link)
        fds = (region.memory.fd,) if region.memory.fd >= 0 else ()
        record = region.record().model_dump_json(exclude_defaults=True).encode()
        self._control.reply(link, message, record, fds)

    def _answer_record(self, message: Message, link: Link) -> None:
        self._control.reply(link, message, self._agent.record())

    def _answer_gone(self, message: Message, link: Link) -> None:
        """Our own peers never wait for handlers of users: letting go has a thread of its own."""
        threading.Thread(target=self._let_go, args=(message, link), name="raynixl-gone", daemon=True).start()

    def _let_go(self, message: Message, link: Link) -> None:
        """A peer withdraws a region, or all at its end: let transfers in flight end, unmap, and say so."""
        connection = self._agent.connector.by_link(link)
        found = _WITHDRAWAL.fullmatch(message.payload)
        if connection is not None and found is not None:
            deadline = time.monotonic() + min(float(found[2]), self._agent.config.deregister_timeout)
            is_all = found[1] == _ALL.encode()
            bindings = connection.withdraw_all() if is_all else connection.withdraw(int(found[1]))
            for binding in bindings:
                if not binding.gate.drain(left(deadline)):
                    binding.gate.close(STALE)
            drain_and_release(bindings)
        self._control.reply(link, message, b"")


def left(deadline: float) -> float:
    """Return the seconds until a monotonic deadline, a moment at least."""
    return max(0.001, deadline - time.monotonic())
