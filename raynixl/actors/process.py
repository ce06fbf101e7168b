"""The agent of this process: one for each Ray actor, task worker or driver, made when it is first needed."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from pydantic import SecretBytes

from raynixl.actors.gcs import DETACHED, GcsDirectory, actor_entry
from raynixl.agents import Agent
from raynixl.config import AgentConfig, from_env
from raynixl.errors import AgentClosed, ConfigError, RaynixlError

logger = logging.getLogger(__name__)

DRIVER = "driver"
_ACTOR_ID_CHARS = 12
_LABEL_CHARS = 200


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a Ray cluster this process stands."""

    gcs: str
    session: str
    job: str
    namespace: str
    node: str
    actor: str
    actor_name: str
    actor_class: str
    worker: str

    @property
    def agent_name(self) -> str:
        """The name that the process's agent takes."""
        if self.actor:
            return self.actor_name or anonymous_name(self.actor_class, self.actor)
        return f"task-{self.worker[:_ACTOR_ID_CHARS]}" if self.worker else DRIVER


class ProcessAgent:
    """Holds the agent of this process; the only singleton of raynixl."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # protects everything below; held while the agent is made or closed
        self._agent: Agent | None = None
        self._directory: GcsDirectory | None = None
        self._is_driver = False
        self._pid = 0
        self._is_ending = False

    def get(self, *, name: str = "", config: AgentConfig | None = None) -> Agent:
        """Return the agent, made now if there is none for this process."""
        agent = self._agent
        if agent is not None and not agent.is_closed and self._pid == os.getpid():
            return agent
        if self._is_ending:
            raise AgentClosed("this process ends, and its agent with it", hint="finish before the end of the script")
        with self._lock:
            agent = self._agent
            if agent is not None and not agent.is_closed and self._pid == os.getpid():
                return agent
            place = here()
            return self._make(place, name or place.agent_name, config)

    def close(self) -> None:
        """Close the agent; the next use makes a new one."""
        with self._lock:
            agent, self._agent = self._agent, None
            if agent is not None and self._pid == os.getpid():
                agent.close()

    def end_job(self) -> None:
        """Close the agent, and remove the job's records if this is its driver: it ends, or Ray was shut down."""
        with self._lock:
            self.close()
            directory, self._directory = self._directory, None
            if directory is not None and self._is_driver and self._pid == os.getpid():
                _end_job(directory)

    def end(self) -> None:
        """Close the agent for good."""
        self._is_ending = True
        self.end_job()

    def _make(self, place: Place, name: str, config: AgentConfig | None) -> Agent:
        directory = GcsDirectory(place.session, place.job, address=place.gcs)
        if not place.worker:
            directory.sweep()
        base = from_env() if config is None else config
        agent = Agent(
            name,
            config=base.model_copy(update={"secret": SecretBytes(directory.secret)}),
            directory=directory,
            labels=_labels(place),
        )
        if self._pid != os.getpid():
            atexit.register(self.end)  # runs before Ray's own, which was registered earlier
        self._agent, self._directory = agent, directory
        self._is_driver, self._pid = not place.worker, os.getpid()
        if self._is_driver:
            _call_at_shutdown(self.end_job)
        return agent


def _labels(place: Place) -> dict[str, str]:
    """Return what the record says of the place: for people, and to find an actor's agent by its handle."""
    labels = {"job_id": place.job, "node_id": place.node, "namespace": place.namespace}
    if place.actor:
        labels |= {"actor_id": place.actor, "actor_class": place.actor_class}
        if actor_entry(place.actor).get("IsDetached"):
            labels["lifetime"] = DETACHED
    return {key: value[:_LABEL_CHARS] for key, value in labels.items()}


def _end_job(directory: GcsDirectory) -> None:
    try:
        directory.end_job()
    except RaynixlError as exc:
        logger.warning("could not remove the job's records: %s", exc)


def _call_at_shutdown(end: Callable[[], None]) -> None:
    """Have `ray.shutdown()` call this.

    Ray has no hook for that. But its worker lets go of its function manager while it shuts down, before it ends the
    processes of a cluster of its own.
    """
    finalizer = weakref.finalize(ray._private.worker.global_worker.function_actor_manager, end)
    finalizer.atexit = False  # the end of the script comes first


_PROCESS = ProcessAgent()


def agent() -> Agent:
    """Return this process's agent: the actor's in an actor, 'driver' in the driver. Made at first use.

    Raises:
        ConfigError: Ray is not initialised.
    """
    return _PROCESS.get()


def start_agent(name: str = "", config: AgentConfig | None = None) -> Agent:
    """Return this process's agent, made with a name and configuration of choice if there is none yet."""
    return _PROCESS.get(name=name, config=config)


def close_agent() -> None:
    """Close this process's agent, if there is one; the next use makes a new one."""
    _PROCESS.close()


def here() -> Place:
    """Return where in the cluster this process stands.

    Raises:
        ConfigError: Ray is not initialised.
    """
    if not ray.is_initialized():
        raise ConfigError("there is no Ray here", hint="call ray.init() first, or use rx.Agent(name) without Ray")
    context: Any = ray.get_runtime_context()
    is_worker = context.worker.mode == ray.WORKER_MODE
    actor = (context.get_actor_id() or "") if is_worker else ""
    return Place(
        gcs=context.gcs_address,
        session=context.get_session_name(),
        job=context.get_job_id(),
        namespace=context.namespace,
        node=context.get_node_id(),
        actor=actor,
        actor_name=(context.get_actor_name() or "") if actor else "",
        actor_class=_actor_class(context) if actor else "",
        worker=context.get_worker_id() if is_worker else "",
    )


def _actor_class(context: Any) -> str:
    """Return the name of this actor's class, as its handles know it."""
    actors = context.worker.actors
    return next((type(actor).__name__ for actor in actors.values()), "")


def anonymous_name(class_name: str, actor_id: str) -> str:
    """Return the agent name of an actor that has no name of its own."""
    return f"{class_name}-{actor_id[:_ACTOR_ID_CHARS]}"
