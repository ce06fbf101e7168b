"""Publication: a source's weights, copied out at each push into arenas that receivers read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from raynixl.errors import AgentClosed, ConfigError, IntegrityError, TransferTimeout
from raynixl.weights.conversion import Cast, Fp8, conversion
from raynixl.weights.copies import Copies, Copy
from raynixl.weights.copyout import Digests
from raynixl.weights.hold import WhileBusy
from raynixl.weights.layout import CHUNK_NBYTES, DEVICE_CHUNK_NBYTES, Layout
from raynixl.weights.original import Original, Publish
from raynixl.weights.protocol import Holder, check_weights_name, topic
from raynixl.weights.selection import Select
from raynixl.weights.served import Served
from raynixl.weights.shards import Shards
from raynixl.weights.sourcing import Described, Freeze, Frozen, Outgoing, Release
from raynixl.weights.streams import Streams

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.weights.bank import Bank
    from raynixl.weights.tensors import Model

_PHASES = ("describe", "outgoing", "freeze", "release", "layout", "status")
_CLOSE_SECONDS = 10.0
_KEPT_PUSHES = 64
_MOVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """How a publication works: threads that digest, the size of chunks, what a push does that finds it busy."""

    threads: int
    chunk_nbytes: int | None
    while_busy: WhileBusy
    keeps_base: bool
    in_place: bool


class Publication:
    """A model under a name, ready to be pushed. Made by `publish`; close it, or use it as a context manager.

    Each push copies the weights out once; after that the trainer may change them. Its memory is one copy of them, and
    a second one when a push may bring a delta, or with while_busy='copy'.
    """

    def __init__(self, agent: Agent, name: str, source: Model, what: Publish, options: Options) -> None:
        self.name = check_weights_name(name)
        if agent.control.serves(topic(name, "freeze")):
            raise ConfigError(f"{agent.name!r} has published {name!r} already", hint="close that publication first")
        self._original = Original(source, what, name=name)
        self.layout: Layout = self._original.layout
        self._agent = agent
        self._options = options
        usual = DEVICE_CHUNK_NBYTES if self._original.spaces[0].is_gpu else CHUNK_NBYTES
        self._chunk_nbytes = usual if options.chunk_nbytes is None else options.chunk_nbytes
        self._served = Served(agent, self.layout, threads=options.threads)
        self._copies = Copies(
            agent, self.layout, f"weights/{name}", while_busy=options.while_busy, keeps_base=options.keeps_base,
            spaces=self._original.spaces,
        )  # fmt: skip
        self._streams = Streams(self._original.tensors)
        if options.in_place:
            with self._streams.alone(_MOVE_SECONDS):
                self._original.move(agent, self._copies.first.view)
        self._changing = threading.RLock()  # held by a trainer that changes weights, or while they are copied out
        self._updates = 0  # how deep the trainer is in `updating`; protected by _changing
        self._versions = threading.Lock()  # protects _pushes, _committed, _is_closed
        self._pushes: dict[str, int] = {}  # push -> version, of the last ones
        self._committed = 0
        self._is_closed = False
        agent.serve(topic(name, "describe"), self._on_describe, threaded=True)
        agent.serve(topic(name, "outgoing"), self._on_outgoing, threaded=True)
        agent.serve(topic(name, "freeze"), self._on_freeze, threaded=True)
        agent.serve(topic(name, "release"), self._on_release, threaded=False)
        agent.serve(topic(name, "layout"), self._on_layout, threaded=True)
        agent.serve(topic(name, "status"), self._on_status, threaded=False)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"version {self._committed}"
        return f"Publication({self.name!r}, {state}, {self.layout})"

    def __enter__(self) -> Publication:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def version(self) -> int:
        """The last version that some target took, or 0."""
        return self._committed

    @contextmanager
    def updating(self, *, timeout: float = 60.0) -> Iterator[None]:
        """Change the weights inside: a push that comes meanwhile copies them out before or after, never between.

        Where they are not copied out, it waits until those who pull them have released them.

        Raises:
            TransferTimeout: a copy-out, or a push of what is not copied out, did not end in time.
        """
        deadline = time.monotonic() + timeout
        with self._alone(deadline, timeout):
            while self._options.in_place and not self._updates and not self._copies.wait_free(0.0):
                self._changing.release()  # a freeze that has the weights needs it to end
                try:
                    self._copies.wait_free(max(0.0, deadline - time.monotonic()))
                finally:
                    self._changing.acquire()
                if time.monotonic() >= deadline:
                    raise self._not_free(timeout)
            self._updates += 1
            try:
                yield
            finally:
                self._streams.note()
                self._updates -= 1

    @contextmanager
    def _alone(self, deadline: float, timeout: float) -> Iterator[None]:
        if not self._changing.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise self._not_free(timeout)
        try:
            yield
        finally:
            self._changing.release()

    def _not_free(self, timeout: float) -> TransferTimeout:
        return TransferTimeout(f"the weights {self.name!r} were not free within {timeout:g} s", hint="try again")

    def close(self) -> None:
        """Answer no more pushes and let go of the copies. Idempotent."""
        with self._versions:
            if self._is_closed:
                return
            self._is_closed = True
        for phase in _PHASES:
            self._agent.control.unserve(topic(self.name, phase))
        is_alone = self._changing.acquire(timeout=_CLOSE_SECONDS)  # a copy-out ends first
        try:
            self._copies.close()
        finally:
            if is_alone:
                self._changing.release()

    def freeze(self, request: Freeze, peer: str) -> bytes:
        """Copy the weights out as a version and keep them for a peer's push, for its time or until its release.

        Raises:
            ConfigError: the version is not above the last, or the model is not what was published.
            TransferTimeout: another push is not over, or the trainer stays in `updating()`.
        """
        deadline = time.monotonic() + request.seconds
        digests = self._served.digests(request)
        copy = self._copies.take(request, self._gone(peer))
        try:
            with self._versions:
                self._check_version(request.version)
                self._note(request)
            began = time.monotonic()
            bank = self._copy_out(copy, deadline, digests)
            seconds = time.monotonic() - began
            answer = self._frozen(request, copy, bank, seconds, digests)
        except BaseException:
            self._copies.release(request.push)
            raise
        if self._is_closed:
            copy.release()  # what it took after everything else was let go of
        self._check_open()
        if not self._copies.has(request.push):  # what lies there may be another push's by now
            raise TransferTimeout(
                f"the weights {self.name!r} were not copied out in time for version {request.version}",
                hint="push again with a longer timeout",
            )
        self._copies.settle(copy, request.version)
        return answer

    def _gone(self, peer: str) -> Callable[[], bool]:
        connection = self._agent.connector.current(peer)
        return lambda: connection is not None and connection.lost is not None

    def _note(self, request: Freeze) -> None:
        self._pushes[request.push] = request.version
        while len(self._pushes) > _KEPT_PUSHES:
            del self._pushes[next(iter(self._pushes))]

    def _check_open(self) -> None:
        if self._is_closed:
            raise AgentClosed(f"the publication of {self.name!r} was closed", hint="publish it again")

    def _check_version(self, version: int) -> None:
        self._check_open()
        if version <= self._committed:
            raise ConfigError(
                f"version {version} of {self.name!r} is not above {self._committed}, which was pushed",
                hint="versions go up",
            )

    def _frozen(self, request: Freeze, copy: Copy, bank: Bank, copy_out_seconds: float, digests: Digests) -> bytes:
        said = self._served.say(request, copy, bank, self._copies, digests)
        return Frozen(
            version=request.version, plan=request.plan, shards=self._original.shards.digest,
            holder=self._holder(copy), nbytes=self.layout.nbytes, copy_out_seconds=copy_out_seconds,
            digest_seconds=said.seconds, partials=said.partials, deltas=said.deltas, delta_region=said.delta_region,
        ).to_bytes()  # fmt: skip

    def _holder(self, copy: Copy) -> Holder:
        regions = tuple(region.record() for region in copy.arenas.regions)
        return Holder(name=self._agent.name, incarnation=self._agent.incarnation, regions=regions)

    def _copy_out(self, copy: Copy, deadline: float, digests: Digests) -> Bank:
        """Bring the weights into a copy; return its memory, which the caller so keeps if the publication is closed."""
        with self._alone(deadline, deadline - time.monotonic()):
            self._check_open()
            self._original.look()  # which GPUs have the tensors now
            with self._streams.alone(deadline - time.monotonic()):
                look = self._original.look()  # only now: an update may have moved tensors
                self._original.copy_out(self._agent, look, copy, digests)
            return copy.arenas.bank

    def _on_describe(self, _peer: str, _payload: bytes) -> bytes:
        shards = self._original.shards
        return Described(
            table=shards.table.digest, rank=shards.rank, version=self._committed, nbytes=self.layout.nbytes,
            chunk_nbytes=self._chunk_nbytes,
        ).to_bytes()  # fmt: skip

    def _on_outgoing(self, _peer: str, payload: bytes) -> bytes:
        self._served.learn(Outgoing.from_bytes(payload))
        return b""

    def _on_freeze(self, peer: str, payload: bytes) -> bytes:
        return self.freeze(Freeze.from_bytes(payload), peer)

    def _on_release(self, _peer: str, payload: bytes) -> bytes:
        request = Release.from_bytes(payload)
        self._copies.release(request.push)
        with self._versions:
            if request.committed:
                self._committed = max(self._committed, self._pushes.get(request.push, 0))
        return b""

    def _on_layout(self, _peer: str, payload: bytes) -> bytes:
        table = self._original.shards.table
        if payload.decode(errors="replace") != table.digest:
            raise IntegrityError(f"{self.name!r} is not published with that table any more", hint="push again")
        return table.to_bytes()

    def _on_status(self, _peer: str, _payload: bytes) -> bytes:
        return str(self._committed).encode()


def publish(  # noqa: PLR0913 - each of them is one thing that a trainer may say
    agent: Agent,
    name: str,
    source: Model,
    *,
    shards: Shards | None = None,
    cast: Cast | None = None,
    quantise: str | Fp8 | None = None,
    select: Select | None = None,
    while_busy: str = "wait",
    delta: str = "auto",
    copy_out: bool = True,
    memory: str = "auto",
    copy_threads: int | None = None,
    chunk_nbytes: int | None = None,
) -> Publication:
    """Offer the weights of a module or state dict to `WeightSync` under a name. Nothing moves yet.

    Parameters and persistent buffers are carried, tied ones once; `select` (globs, or a function of the name) takes
    some of them, such as "*.lora_*". `shards` says what the tensors are parts of; without it they are whole.
    `cast` converts real tensors on their way out to a dtype, or to dtypes by glob; `quantise="fp8"` brings weights to
    FP8 e4m3 with scales for blocks of 128 x 128 as `<name>_scale_inv`. `while_busy` is what becomes of a push that
    comes while another one is not over: 'wait', 'refuse' or 'copy' into memory of its own. `delta="auto"` keeps the
    version before, so that pushes that change little can bring that alone; 'off' does not. With `copy_out=False` the
    tensors move into memory that peers read, once, and nothing is copied at a push; they must not change from then
    until it releases them: `updating()` waits for that. `memory` is where the copies lie: 'vram' on the GPU that the
    tensors are on, 'dram' in the host's memory, 'auto' on the GPU if it has room. `copy_threads` digest (the agent's
    by default), and `chunk_nbytes` are checked at a time: 8 MiB, 64 MiB on a GPU.

    Raises:
        ConfigError: an argument is unusable, the name is taken, or the model holds what cannot be carried.
        RangeError: the host has too little memory for a copy of it.
    """
    threads = agent.config.copy_threads if copy_threads is None else copy_threads
    if threads < 1 or not (chunk_nbytes is None or 4096 <= chunk_nbytes <= 1 << 40):
        raise ConfigError(
            f"{threads} copy threads, chunks of {chunk_nbytes} bytes", hint="use 1 or more, and 4 KiB or more"
        )
    if while_busy not in {way.value for way in WhileBusy}:
        raise ConfigError(f"while_busy={while_busy!r:.40} is not known", hint="use 'wait', 'refuse' or 'copy'")
    if delta not in ("auto", "off"):
        raise ConfigError(f"delta={delta!r:.40} is not known", hint="use 'auto' or 'off'")
    conversions = conversion(cast, quantise)
    if not copy_out and (while_busy == WhileBusy.COPY.value or not conversions.is_nothing):
        raise ConfigError(
            "what is not copied out can be neither converted nor copied aside", hint="leave copy_out=False away"
        )
    keeps_base = delta == "auto" and copy_out
    options = Options(threads, chunk_nbytes, WhileBusy(while_busy), keeps_base=keeps_base, in_place=not copy_out)
    what = Publish(shards, select, conversions, in_place=not copy_out, memory=memory)
    return Publication(agent, name, source, what, options)
