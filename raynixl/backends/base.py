"""The backend contract: what the agent asks of a path that carries bytes, and what it does for it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeGuard, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from raynixl.blocks import Segments
from raynixl.config import AgentConfig
from raynixl.errors import RaynixlError
from raynixl.memory import Memory, MemoryKind
from raynixl.native import Engine, Gate, Job, Native, Program
from raynixl.reactor import Reactor
from raynixl.record import AgentRecord
from raynixl.region import Region, RemoteRegion

if TYPE_CHECKING:
    from raynixl.cuda import Event


MAPPED: Final = "mapped"
"""The path of a region whose arena is mapped in this process."""
MEMORY: Final = "memory"
"""The path of a region in this process's own memory."""


class Op(enum.Enum):
    """Direction of a transfer, seen from the agent that posts it."""

    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do: the (local, remote) memory kinds it carries, and whether it carries messages."""

    kinds: frozenset[tuple[MemoryKind, MemoryKind]]
    messages: bool = False


class Link(Protocol):
    """One connection of one backend with one incarnation of a peer.

    `send` may be called from any thread, keeps the order of each thread's messages, never blocks and raises
    `PeerLost` once the link is down. File descriptors travel where the backend can carry them.
    """

    backend: str
    peer: str
    incarnation: str
    lost: RaynixlError | None

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message of any size up to config.max_message_nbytes."""

    def flushed(self) -> bool:
        """Whether all that was sent has left this process."""

    def is_frozen(self) -> bool:
        """Whether the peer is known to be stopped (not merely busy)."""

    def close(self, error: RaynixlError | None = None) -> None:
        """Close; reported once to the agent's `link_lost`. Idempotent."""


class LinkEvents(Protocol):
    """What a backend tells its agent; called on the reactor's thread, must not block."""

    def link_opened(self, link: Link) -> None:
        """Take a link that a peer opened; the peer has proved who it is."""

    def message_received(self, link: Link, message: bytes, fds: Sequence[int]) -> None:
        """Take one message; the descriptors are the agent's to close."""

    def link_lost(self, link: Link, error: RaynixlError) -> None:
        """Hear that a link is down, for which reason."""

    def link_flushed(self, link: Link) -> None:
        """Hear that what a link held back has left this process."""

    def message_dropped(self, reason: str) -> None:
        """Count something malformed or unwanted that came in."""


@dataclass(frozen=True, slots=True)
class Local:
    """The agent as its backends see it."""

    name: str
    incarnation: str
    host: str
    config: AgentConfig
    native: Native
    engine: Engine
    reactor: Reactor
    events: LinkEvents


@dataclass(slots=True, eq=False)
class Binding:
    """A peer's region made reachable over one link: its gate, and what the backend needs to address it.

    The agent closes the gate when the peer is lost or the region goes, drains it, and then calls `release`.
    """

    remote: RemoteRegion
    link: Link
    gate: Gate
    path: str
    """The way inside the backend, for people: 'mapped', 'process_vm', 'cma', ..."""
    address: int = 0
    state: Any = field(default=None, repr=False)

    @property
    def is_usable(self) -> bool:
        """Whether a transfer may be compiled for it; if not, the region is bound anew."""
        return self.gate.code == 0

    @property
    def is_mapped(self) -> bool:
        """Whether the region's memory lies at `address` in this process, for any thread to load and store."""
        return self.remote.kind is MemoryKind.DRAM and self.path in (MAPPED, MEMORY)

    def release(self) -> None:
        """Let go of mappings; nobody is inside the gate any more."""
        state, self.state = self.state, None
        if state is not None:
            state.close()


@dataclass(frozen=True, slots=True)
class Request:
    """One resolved operation. Segment columns index `local` and `remote`, by direction."""

    op: Op
    segments: Segments
    local: Sequence[Region]
    remote: Sequence[Binding]

    @property
    def gates(self) -> list[Gate]:
        """Every gate that the operation passes."""
        return [region.gate for region in self.local] + [binding.gate for binding in self.remote]


class Backend(Protocol):
    """A path that carries bytes. Made by a factory that takes `Local`; one object for each agent.

    Methods raise `BackendUnavailable` for what the backend cannot do, and the agent then asks the next one.
    """

    name: str
    capabilities: Capabilities

    def local_metadata(self) -> dict[str, str | int]:
        """Return how peers reach this backend, for the agent's record."""

    def reaches(self, record: AgentRecord) -> str:
        """Return '' if the peer can be reached over this backend, else why not."""

    def register(self, region_id: int, memory: Memory) -> dict[str, str | int]:
        """Make memory reachable by peers; return the key that travels inside the region's descriptor."""

    def deregister(self, region_id: int) -> None:
        """Withdraw memory; the agent has closed and drained it."""

    def connect(self, record: AgentRecord, deadline: float) -> Link:
        """Connect and authenticate by the monotonic deadline; blocks, on a thread of the agent's own.

        Raises:
            PeerLost: nobody answers there.
            PeerRestarted: another incarnation answers.
            TransferTimeout: the deadline passed.
        """

    def bind(self, link: Link, remote: RemoteRegion, fds: Sequence[int]) -> Binding:
        """Make a peer's region reachable; `fds` came with the peer's consent and stay the caller's to close."""

    def prepare(self, request: Request) -> list[Program]:
        """Resolve a request into programs that can be run any number of times."""

    def close(self) -> None:
        """Close every link and let go of everything; idempotent."""


class StreamProgram(Protocol):
    """A program that a GPU runs: besides what every program does, it may follow what is on a stream."""

    def run(self, timeout: float, out_of_line: bool = False) -> int | Job:
        """See `Program.run`."""

    def run_after(self, timeout: float, event: Event) -> int | Job:
        """Run once an event has come, without this thread waiting for it. The deadline counts from now."""


def takes_events(program: Program) -> TypeGuard[StreamProgram]:
    """Whether a program is a `StreamProgram`: asked at every binding, where `isinstance` would cost 9 us."""
    return hasattr(program, "run_after")


class CapturedProgram(Protocol):
    """A program inside a CUDA graph; see `GraphProgram`."""

    @property
    def code(self) -> int:
        """That of a gate that was closed, and then nothing was captured; else 0."""

    @property
    def runs(self) -> int:
        """How many replays have come to the program's end."""

    def close(self) -> None:
        """Leave the gates: no replay is in flight, nor will be. Idempotent."""


@runtime_checkable
class GraphProgram(Protocol):
    """A program that a GPU runs without the host."""

    def capture(self, stream: int) -> CapturedProgram:
        """Put it on a stream that is being captured. Its gates stay entered until it is closed."""


class StreamJob(Protocol):
    """A job that a GPU runs: streams may wait for it."""

    def order(self, stream: int, device: int) -> None:
        """Have what is put on a stream of a GPU from now on wait for the job's end, without this thread waiting."""


@runtime_checkable
class NamesPaths(Protocol):
    """What a backend may offer whose path depends on both ends, for `agent.explain`."""

    def path(self, local: Region, binding: Binding) -> str:
        """Return the path between these two, more exactly than `binding.path`."""


@runtime_checkable
class Describes(Protocol):
    """What a backend may offer besides, for `agent.explain`."""

    def describe(self, local: Region, binding: Binding) -> str:
        """Say for people how bytes go between these two, beyond the binding's path: devices, why these; or ''."""


@runtime_checkable
class ServesKernels(Protocol):
    """What a backend may offer whose peers' memory a GPU's kernels can load and store, for `agent.window(device=)`."""

    def reach(self, binding: Binding, device: int) -> int:
        """Return where kernels of a GPU reach a peer's region.

        Raises:
            BackendUnavailable: they do not.
        """


@runtime_checkable
class CopiesHere(Protocol):
    """What a backend may offer that copies between two regions of its own agent, of which one is in a GPU's memory."""

    def copy(self, source: Region, target: Region, rows: NDArray[np.uint64]) -> list[Program]:
        """Compile rows of (offset in source, offset in target, nbytes); the programs pass both regions' gates.

        Raises:
            BackendUnavailable: it does not reach both.
        """


class TakesTime(Protocol):
    """What a backend offers besides if its `prepare` may take long: the agent then calls that on a thread."""

    def is_ready(self, local: Sequence[Region]) -> bool:
        """Whether a request with these regions of ours can be compiled at once."""


def can_be_followed(job: Job) -> TypeGuard[StreamJob]:
    """Whether a job is a `StreamJob`; see `takes_events`."""
    return hasattr(job, "order")


def is_ready(backend: Backend, local: Sequence[Region]) -> bool:
    """Whether a request with these regions of ours can be compiled at once; see `TakesTime`."""
    asks = getattr(backend, "is_ready", None)
    return asks is None or asks(local)
