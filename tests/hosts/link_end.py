"""One end of TCP links in a process of its own: run in a host, told by its standard input what to do."""

from __future__ import annotations

import json
import sys
import time
from hashlib import sha256
from typing import Any

from link_tools import End

from raynixl import RaynixlError
from raynixl.record import AgentRecord

SECRET = b"of the hosts"


def heard(end: End, count: int, timeout: float) -> list[str]:
    """Wait for messages; return their digests."""
    end.reactor.run_until(lambda: len(end.heard) >= count, time.monotonic() + timeout)
    return [sha256(message).hexdigest() for message in end.heard]


def lost(end: End, timeout: float) -> list[str]:
    """Wait for a link to end; say why each did that has."""
    end.reactor.run_until(lambda: bool(end.lost), time.monotonic() + timeout)
    return [f"{type(error).__name__}: {error}" for error in end.lost]


def answer(end: End, do: str, **fields: Any) -> Any:
    """Do one thing."""
    if do == "introduce":
        return {"record": end.record.to_bytes().decode(), "endpoints": end.listener.endpoints}
    if do == "connect":
        endpoints = [(host, port) for host, port in fields["endpoints"]]
        link = end.connect(AgentRecord.from_bytes(fields["record"].encode()), endpoints, fields["timeout"])
        end.opened.append(link)
        return link._sock.getpeername()[0]
    if do == "send":
        message = fields["text"].encode() * fields["times"]
        end.opened[-1].send(message)
        return sha256(message).hexdigest()
    return {"heard": heard, "lost": lost}[do](end, **fields)


def main(name: str, hosts: list[str], heartbeat_timeout: float) -> None:
    """Serve until the standard input closes."""
    settings = {"heartbeat_interval": heartbeat_timeout / 4, "heartbeat_timeout": heartbeat_timeout, "secret": SECRET}
    with End(name, hosts=hosts, **settings) as end:
        for line in sys.stdin:
            try:
                said = [answer(end, **json.loads(line)), ""]
            except RaynixlError as exc:
                said = [None, f"{type(exc).__name__}: {exc}"]
            print(json.dumps(said), flush=True)


main(sys.argv[1], sys.argv[2].split(","), float(sys.argv[3]))
