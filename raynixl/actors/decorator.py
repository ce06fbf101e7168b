"""The worker decorator: an actor class whose actors host an agent."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast, overload

import ray

from raynixl.actors.process import start_agent
from raynixl.config import AgentConfig, check_config
from raynixl.errors import ConfigError

T = TypeVar("T")


@overload
def worker(cls: T) -> T: ...
@overload
def worker(*, name: str = "", config: AgentConfig | None = None) -> Callable[[T], T]: ...
def worker(cls: Any = None, *, name: str = "", config: AgentConfig | None = None) -> Any:
    """Give every actor of a class an agent, started in the actor's process just before its `__init__`.

    Stands under or above `@ray.remote`. The class stays itself: outside an actor it is a plain class. The agent is
    named `name`, else as the actor is, else after the class and the actor's id.

    Raises:
        ConfigError: what it decorates is not a class, or `config` no configuration.
    """
    if cls is None:
        return functools.partial(_decorate, name=name, config=config)
    return _decorate(cls, name=name, config=config)


def _decorate(target: Any, *, name: str, config: AgentConfig | None) -> Any:
    if config is not None:
        check_config(config)
    if isinstance(target, ray.actor.ActorClass):
        _hook(cast(Any, target).__ray_metadata__.modified_class, name, config)
    elif inspect.isclass(target):
        _hook(target, name, config)
    else:
        raise ConfigError(
            f"@rx.worker decorates actor classes, not {target!r:.80}",
            hint="write it under @ray.remote, above the class; for a handle use rx.attach(handle)",
        )
    return target


def _hook(cls: type[Any], name: str, config: AgentConfig | None) -> None:
    """Put the start of the agent in front of the class's `__init__`, in place."""
    own = vars(cls).get("__init__")

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        _start_in_actor(self, name, config)
        if own is not None:
            own(self, *args, **kwargs)
        else:
            super(cls, self).__init__(*args, **kwargs)

    shown = cls.__init__
    if inspect.isfunction(shown):
        functools.update_wrapper(__init__, shown)
    else:  # to wrap object's own __init__ would break Ray's look at the signature
        parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        __init__.__signature__ = inspect.Signature([parameter])  # type: ignore[attr-defined]
        __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    cls.__init__ = __init__


def _start_in_actor(instance: Any, name: str, config: AgentConfig | None) -> None:
    """Start the agent if the instance is this process's actor, rather than one of its class made beside it."""
    if ray.is_initialized():
        worker = ray._private.worker.global_worker
        if worker.mode == ray.WORKER_MODE and any(actor is instance for actor in worker.actors.values()):
            start_agent(name, config)
