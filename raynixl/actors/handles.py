"""Actor handles: the agents behind them, and giving one to an actor that somebody else decorated."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray

from raynixl.actors.gcs import GcsDirectory, actor_entry, session_records
from raynixl.actors.process import agent, anonymous_name, here, start_agent
from raynixl.config import AgentConfig
from raynixl.errors import ConfigError, PeerLost, PeerUnknown, TransferTimeout
from raynixl.record import AgentRecord

logger = logging.getLogger(__name__)

ATTACH_TIMEOUT = 30.0
START_TIMEOUT = 600.0
"""How long actors are waited for that are still being made: their `__init__` may load a large model."""
_TELL_SECONDS = 30.0


def attach(handle: Any, *, name: str = "", config: AgentConfig | None = None, timeout: float = ATTACH_TIMEOUT) -> str:
    """Give the actor behind a handle an agent, whoever made the actor; return the agent's name. Idempotent.

    The actor must get to it between two of its methods.

    Raises:
        TransferTimeout: the actor was busy for all of `timeout`.
        PeerLost: the actor is dead.
        ConfigError: this is not a handle, the name is taken, or the actor is another job's.
    """
    if not isinstance(handle, ray.actor.ActorHandle):
        raise ConfigError(f"{handle!r:.80} is not an actor handle", hint="pass what Class.remote() returned")
    call: Any = handle.__ray_call__.remote(_start_here, name, config, here().job)
    try:
        return str(ray.get(call, timeout=timeout))
    except ray.exceptions.GetTimeoutError as exc:
        ray.cancel(call)
        raise TransferTimeout(
            f"the actor {actor_id(handle)} did not start an agent within {timeout:g} s",
            hint="attach before it is busy, or give it longer",
        ) from exc
    except ray.exceptions.ActorUnavailableError as exc:
        raise PeerLost(f"the actor {actor_id(handle)} restarts or cannot be reached", hint="try again") from exc
    except ray.exceptions.RayActorError as exc:
        raise PeerLost(f"the actor {actor_id(handle)} is dead") from exc
    except ray.exceptions.RayTaskError as exc:
        if isinstance(exc.cause, ConfigError):
            raise exc.cause from exc
        raise


def _start_here(_actor: Any, name: str, config: AgentConfig | None, job: str) -> str:
    place = here()
    if place.job != job:
        raise ConfigError(
            f"the actor {place.actor} belongs to job {place.job}, not to {job}",
            hint="agents are found within their job only: make the actor in this one",
        )
    return start_agent(name, config).name


def actor_id(handle: Any) -> str:
    """Return the id of the actor behind a handle."""
    return str(handle._actor_id.hex())


def agent_name(worker: Any, *, timeout: float = START_TIMEOUT) -> str:
    """Return the name of the agent behind an actor handle, waiting until it is published; names stay as they are.

    Raises:
        PeerUnknown: the actor has no agent.
        PeerLost: the actor is dead.
    """
    return worker if isinstance(worker, str) else agent_names([worker], timeout=timeout)[0]


def agent_names(workers: Sequence[Any], *, timeout: float = START_TIMEOUT) -> list[str]:
    """Return the names of the agents behind actor handles; names stay as they are. See `agent_name`."""
    handles = [worker for worker in workers if not isinstance(worker, str)]
    for handle in handles:
        if not isinstance(handle, ray.actor.ActorHandle):
            raise ConfigError(f"{handle!r:.80} is neither an actor handle nor a name", hint="pass one of the two")
    known = _names_by_actor() if handles else {}
    if any(actor_id(handle) not in known for handle in handles):
        _wait_constructed(handles, timeout)
        known = _names_by_actor()
    return [worker if isinstance(worker, str) else _look_up(worker, known) for worker in workers]


def _names_by_actor() -> dict[str, str]:
    directory = agent().directory
    assert isinstance(directory, GcsDirectory)
    return {record.labels["actor_id"]: record.name for record in directory.list() if "actor_id" in record.labels}


def _wait_constructed(handles: Sequence[Any], timeout: float) -> None:
    """Wait until every actor's `__init__` has run: its agent is published then, if it has one.

    The log says who is waited for.
    """
    ready = [handle.__ray_ready__.remote() for handle in handles]
    until = time.monotonic() + timeout
    try:
        while not _are_ready(ready, min(_TELL_SECONDS, until - time.monotonic())):
            error = _not_ready(handles, ready, timeout)
            if time.monotonic() >= until:
                raise error
            logger.warning("%s", error)
    except ray.exceptions.RayActorError as exc:
        raise PeerLost(f"an actor died before it was ready: {exc}") from exc


def _are_ready(ready: Sequence[Any], timeout: float) -> bool:
    try:
        ray.get(list(ready), timeout=max(0.0, timeout))
    except ray.exceptions.GetTimeoutError:
        return False
    return True


def _not_ready(handles: Sequence[Any], ready: Sequence[Any], timeout: float) -> TransferTimeout:
    """Say which actors are not ready, and whether Ray has given them a process at all."""
    done = set(ray.wait(list(ready), num_returns=len(ready), timeout=0)[0])
    entries = [actor_entry(actor_id(handle)) for handle, ref in zip(handles, ready, strict=True) if ref not in done]
    waiting = [_shown(entry) for entry in entries if not entry.get("Pid")]
    starting = [_shown(entry) for entry in entries if entry.get("Pid")]
    parts = []
    if waiting:
        parts.append(f"Ray has not started {', '.join(waiting)}")
    if starting:
        parts.append(f"the __init__ of {', '.join(starting)} has not ended, or a method runs")
    hint = "wait longer with timeout=, or see what they do"
    if waiting:
        hint = "see `ray status`: has the cluster the CPUs and GPUs that they ask for (num_cpus=)? else wait longer"
    what = "; ".join(parts) or "they were only just ready"
    return TransferTimeout(f"not all actors are ready, for which {timeout:g} s are given: {what}", hint=hint)


def _shown(entry: dict[str, object]) -> str:
    """Name an actor as its agent will be."""
    return str(entry.get("Name") or anonymous_name(str(entry.get("ActorClassName")), str(entry.get("ActorID"))))


def _look_up(handle: Any, known: dict[str, str]) -> str:
    name = known.get(actor_id(handle))
    if name is None:
        raise PeerUnknown(
            f"the actor {actor_id(handle)} has no agent in this job",
            hint="decorate its class with @rx.worker, or call rx.attach(handle)",
        )
    return name


def list_agents() -> list[AgentRecord]:
    """Return the live records of every job of the cluster that this process is connected to."""
    place = here()
    return session_records(place.session, place.gcs)
