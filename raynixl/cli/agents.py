"""`raynixl agents`: who is in the Ray cluster."""

from __future__ import annotations

import logging
import socket
import time
from typing import Any

from rich.table import Table

from raynixl.cli.screen import emit, say, show
from raynixl.errors import BackendUnavailable, PeerLost
from raynixl.record import AgentRecord

Row = dict[str, Any]
_KNOCK_SECONDS = 5.0
_HINT = "start a cluster with `ray start --head`, or give --address; agents of a script's own ray.init() end with it"


def show_agents(address: str, *, is_json: bool) -> None:
    """Connect to a running cluster and list its agents.

    Raises:
        BackendUnavailable: Ray is not installed.
        PeerLost: no cluster answers there.
    """
    try:
        import ray
    except ImportError as exc:
        raise BackendUnavailable("Ray is not installed", hint="pip install 'raynixl[ray]'") from exc
    _check_reachable(address)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as exc:
        raise PeerLost(f"no Ray cluster answers at {address!r}", hint=_HINT) from exc
    try:
        from raynixl.actors import list_agents

        records = sorted(list_agents(), key=lambda one: (one.labels.get("job_id", ""), one.name))
        rows = [_row(record) for record in records]
    finally:
        ray.shutdown()
    if is_json:
        for row in rows:
            emit(row)
    elif rows:
        show(_table(rows))
    else:
        say("no agents are published in this cluster")


def _check_reachable(address: str) -> None:
    """Knock first: Ray itself tries for a long while, and floods the screen meanwhile.

    Raises:
        PeerLost: nobody listens at that host and port.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        return  # 'auto', 'local' or ray://...: for Ray to find out
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
    except (OSError, OverflowError) as exc:
        raise PeerLost(f"nobody listens at {address!r}: {exc}", hint=_HINT) from exc


def _row(record: AgentRecord) -> Row:
    return {
        "name": record.name,
        "incarnation": record.incarnation,
        "labels": dict(record.labels),
        "host": record.host,
        "pid": record.pid,
        "backends": sorted(record.backends),
        "regions": {region.name: region.nbytes for region in record.regions},
        "lease_seconds": round(record.expires - time.time(), 1) if record.expires else None,
    }


def _actor(labels: dict[str, str]) -> str:
    """Return class and id of the actor, or '-' for drivers and tasks."""
    return " ".join((labels.get("actor_class", ""), labels.get("actor_id", "")[:12])).strip() or "-"


def _table(rows: list[Row]) -> Table:
    table = Table(title="agents", title_justify="left", header_style="bold")
    for heading in ("name", "job", "actor", "node", "host", "pid", "backends", "regions", "lease"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("pid", "lease") else "left")
    for row in rows:
        labels, lease = row["labels"], row["lease_seconds"]
        table.add_row(
            row["name"], labels.get("job_id", "-"), _actor(labels), labels.get("node_id", "-")[:12], row["host"][:8],
            str(row["pid"]), ", ".join(row["backends"]), ", ".join(row["regions"]) or "-",
            "-" if lease is None else f"{lease:g} s",
        )  # fmt: skip
    return table
