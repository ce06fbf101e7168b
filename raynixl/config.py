"""Configuration of an agent, checked by pydantic; `from_env` is the only reader of the environment."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SecretBytes, ValidationError

from raynixl.errors import ConfigError

logger = logging.getLogger(__name__)

MIB = 1 << 20
_PREFIX = "RAYNIXL_"
GPU_CONTROL = "/dev/nvidiactl"
"""What the NVIDIA driver makes on hosts with GPUs, and containers that were given one have."""

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


_LONGEST = 1e9  # seconds: no wait is for ever, and the system calls below take no more


def check_timeout(seconds: float | None, default: float, *, what: str = "timeout") -> float:
    """Return a deadline in seconds, `default` for None.

    Raises:
        ConfigError: it is not a positive finite number.
    """
    if seconds is None:
        return default
    if not isinstance(seconds, Real) or not 0 < seconds < _LONGEST:
        raise ConfigError(f"{what} {seconds!r:.80} is no deadline", hint="give a positive finite number of seconds")
    return float(seconds)


def check_wait(seconds: float) -> float:
    """Return how long to wait, in seconds; 0 is a look without waiting.

    Raises:
        ConfigError: it is negative, not finite or not a number.
    """
    if not isinstance(seconds, Real) or not 0 <= seconds < _LONGEST:
        raise ConfigError(
            f"timeout {seconds!r:.80} is no time to wait", hint="give a finite number of seconds, 0 or more"
        )
    return float(seconds)


def default_copy_threads() -> int:
    """Return how many threads copy large blocks by default: the cores we may use, four at most."""
    return max(1, min(4, len(os.sched_getaffinity(0))))


def default_backends() -> tuple[str, ...]:
    """Return the backends of an agent whose configuration names none.

    Whether there are GPUs is asked of the file system: that costs microseconds, and loads no driver.
    """
    nvlink = ("nvlink",) if os.path.exists(GPU_CONTROL) else ()
    ucx = ("ucx",) if importlib.util.find_spec("ucxx") is not None else ()
    return ("loopback", "shm", *nvlink, *ucx)


class AgentConfig(BaseModel):
    """How an agent behaves. Every wait it makes is bounded by one of these deadlines.

    Raises:
        ConfigError: there is no setting of that name, or its value is not usable.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    if not TYPE_CHECKING:  # to type checkers the settings below are its arguments

        def __init__(self, **settings: Any) -> None:
            try:
                super().__init__(**settings)
            except ValidationError as exc:
                raise _unusable(exc) from exc

    backends: tuple[str, ...] = Field(default_factory=default_backends, min_length=1)
    """Backends in order of preference; the first that can carry a transfer takes it. By default those that serve one
    host, `nvlink` where there is a GPU, and `ucx` where ucxx is installed.
    """
    native: bool = True
    """Use the compiled core where it is installed; False forces its ctypes twin."""
    copy_threads: int = Field(default_factory=default_copy_threads, ge=1, le=256)
    """Threads that copy one large transfer together, a waiting caller included."""
    inline_nbytes: int = Field(default=4 * MIB, ge=0, le=64 * MIB)
    """Transfers up to this size are copied by the posting thread: waking another costs as much as copying 1 MiB.

    With a single copy thread four times as much, since there is nobody to share the work with.
    """
    process_vm: bool = True
    """Reach plain memory of peers by process_vm, and let peers of the same user reach ours: where Yama's ptrace_scope
    is 1, the process then allows all processes of its user what it otherwise allows its ancestors. False: arenas only.
    """
    ucx: dict[str, str] = Field(default_factory=dict)
    """Options of UCX without the prefix UCX_, as {"TLS": "cma,tcp"}; they win over the user's UCX_* variables, which
    UCX itself reads. In RAYNIXL_UCX they are separated by semicolons: TLS=cma,tcp;NET_DEVICES=eth0.
    """
    interfaces: tuple[str, ...] = ()
    """Interfaces on which peers on the network are heard and whose addresses they are told; empty: all that are up.
    Without a secret it is the loopback interface only.
    """
    listen_port: int = Field(default=0, ge=0, le=65_535)
    """Port on which peers on the network are heard; 0: any that is free."""
    rails: tuple[str, ...] = Field(default=(), max_length=16)
    """Network devices, as UCX names them (mlx5_0:1, eth1), over which large transfers are striped. Empty: the RDMA
    devices near the memory, where there are several, else whatever UCX chooses.
    """
    transfer_timeout: Seconds = 30.0
    """Deadline of a transfer that names none."""
    connect_timeout: Seconds = 10.0
    """Deadline for finding, connecting and authenticating one peer."""
    request_timeout: Seconds = 10.0
    """Deadline of one control message's answer."""
    deregister_timeout: Seconds = 5.0
    """How long deregister waits for peers to finish before their connections are closed by force."""
    heartbeat_interval: Seconds = 1.0
    """How often a connected peer that has said nothing is asked whether it is there."""
    heartbeat_timeout: Seconds = 5.0
    """Silence after which a peer is examined, and given up as lost if it is frozen or unreachable."""
    lease_seconds: Seconds = 30.0
    """How long a published record counts without renewal; renewed at a third of it."""
    max_message_nbytes: int = Field(default=64 * MIB, ge=4096, le=1024 * MIB)
    """Largest control message or notification that is accepted from a peer."""
    secret: SecretBytes = SecretBytes(b"")
    """Shared secret that peers must prove to know; the Ray layer fills in the job's."""


def parse_options(texts: Iterable[str]) -> dict[str, str]:
    """Return the options of UCX that texts such as TLS=cma,tcp name; a prefix UCX_ is dropped.

    Raises:
        ConfigError: one has no name or no `=`.
    """
    options = {}
    for text in texts:
        name, is_set, value = text.strip().partition("=")
        if not name or not is_set:
            raise ConfigError(f"{text!r:.80} is no option of UCX", hint="write NAME=VALUE, as TLS=cma,tcp")
        options[name.removeprefix("UCX_")] = value
    return options


_PARSERS: dict[str, Callable[[str], object]] = {
    "backends": lambda text: tuple(text.split(",")),
    "interfaces": lambda text: tuple(text.split(",")),
    "rails": lambda text: tuple(text.split(",")),
    "ucx": lambda text: parse_options(part for part in text.split(";") if part.strip()),
}


def variables(prefix: str) -> dict[str, str]:
    """Return the environment's variables whose names begin so."""
    return {name: value for name, value in os.environ.items() if name.startswith(prefix)}


@contextlib.contextmanager
def kept_variables(prefix: str) -> Iterator[None]:
    """Undo what is done meanwhile to the environment's variables whose names begin so: some imports write them."""
    before = variables(prefix)
    try:
        yield
    finally:
        for name in variables(prefix):
            if name not in before:
                del os.environ[name]
        os.environ.update(before)


def from_env(base: AgentConfig | None = None) -> AgentConfig:
    """Return `base` (or the defaults) overridden by RAYNIXL_* variables, e.g. RAYNIXL_COPY_THREADS=2.

    Lists are separated by commas; booleans are 0 or 1. A variable that names no setting is warned of.

    Raises:
        ConfigError: a variable holds an unusable value.
    """
    values = {} if base is None else base.model_dump()
    for variable, text in variables(_PREFIX).items():
        name = variable.removeprefix(_PREFIX).lower()
        if name not in AgentConfig.model_fields:
            logger.warning("the variable %s sets nothing: there is no setting %r; %s", variable, name, _alike(name))
            continue
        try:
            values[name] = _PARSERS.get(name, str)(text)
        except ConfigError as exc:
            raise _refusal(name, exc.message) from exc
    return AgentConfig(**values)


def check_config(config: AgentConfig | None) -> AgentConfig:
    """Return what an agent goes by: what it was given, or the defaults and the environment for None.

    Raises:
        ConfigError: it is something else, or a variable holds an unusable value.
    """
    if config is None:
        return from_env()
    if not isinstance(config, AgentConfig):
        raise ConfigError(f"{config!r:.80} is no configuration", hint="give config=rx.AgentConfig(...)")
    return config


def _unusable(exc: ValidationError) -> ConfigError:
    """Say which setting cannot be used and why, of what pydantic found first."""
    first = exc.errors(include_url=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "?"
    if first["type"] == "extra_forbidden":
        return ConfigError(f"there is no setting {name!r}", hint=_alike(name))
    return _refusal(name, first["msg"])


def _refusal(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"setting {name!r} is not usable: {reason}", hint=f"mend it in AgentConfig or in {_PREFIX}{name.upper()}"
    )


def _alike(name: str) -> str:
    """Say which settings there are that somebody may have meant."""
    found = difflib.get_close_matches(name, AgentConfig.model_fields, n=1)
    return f"did you mean {found[0]!r}?" if found else f"there are: {', '.join(AgentConfig.model_fields)}"
