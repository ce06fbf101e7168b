"""Publication: a source's weights, copied out at each push into arenas that receivers read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from raynixl.errors import AgentClosed, ConfigError, IntegrityError, TransferTimeout
from raynixl.weights.arenas import Arenas
from raynixl.weights.digest import digest_chunks, version_digest
from raynixl.weights.hold import Hold
from raynixl.weights.layout import CHUNK_NBYTES, Layout, build_layout
from raynixl.weights.protocol import Freeze, Frozen, Holder, Manifest, Release, check_weights_name, topic
from raynixl.weights.tensors import collect, copy_tensors, describe, dtype_name, is_tied

if TYPE_CHECKING:
    import torch

    from raynixl.agents import Agent
    from raynixl.weights.tensors import Model, Tensors

_PHASES = ("freeze", "release", "layout", "status")
_CLOSE_SECONDS = 10.0


class Publication:
    """A model under a name, ready to be pushed. Made by `publish`; close it, or use it as a context manager.

    Each push copies the weights out once; after that the trainer may change them. Its memory is one copy of them.
    """

    def __init__(self, agent: Agent, name: str, source: Model, *, threads: int, chunk_nbytes: int) -> None:
        self.name = check_weights_name(name)
        if agent.control.serves(topic(name, "freeze")):
            raise ConfigError(f"{agent.name!r} has published {name!r} already", hint="close that publication first")
        self.layout: Layout = build_layout(describe(collect(source)))
        self._agent = agent
        self._source = source
        self._threads = threads
        self._chunk_nbytes = chunk_nbytes
        self._chunks = self.layout.chunks(chunk_nbytes)
        self._arenas = Arenas(agent, self.layout, name=f"weights/{name}")
        self._views: Tensors = {}
        self._hold = Hold()
        self._changing = threading.RLock()  # held by a trainer that changes weights, or while they are copied out
        self._versions = threading.Lock()  # protects _frozen, _committed, _is_closed
        self._frozen = 0
        self._committed = 0
        self._is_closed = False
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

        Raises:
            TransferTimeout: a copy-out did not end in time.
        """
        if not self._changing.acquire(timeout=timeout):
            raise TransferTimeout(f"the weights {self.name!r} were not free within {timeout:g} s", hint="try again")
        try:
            yield
        finally:
            self._changing.release()

    def close(self) -> None:
        """Answer no more pushes and let go of the arenas. Idempotent."""
        with self._versions:
            if self._is_closed:
                return
            self._is_closed = True
        for phase in _PHASES:
            self._agent.control.unserve(topic(self.name, phase))
        is_alone = self._changing.acquire(timeout=_CLOSE_SECONDS)  # a copy-out ends first
        try:
            self._views = {}
            self._arenas.release()
        finally:
            if is_alone:
                self._changing.release()

    def freeze(self, request: Freeze, peer: str) -> Frozen:
        """Copy the weights out as a version and keep them for a peer's push, for its time or until its release.

        Raises:
            ConfigError: the version is not above the last, or the model is not what was published.
            TransferTimeout: another push is not over, or the trainer stays in `updating()`.
        """
        push, version = request.push, request.version
        deadline = time.monotonic() + request.seconds
        connection = self._agent.connector.current(peer)
        is_gone = None if connection is None else lambda: connection.lost is not None
        self._hold.take(push, request.seconds, is_gone=is_gone)
        try:
            with self._versions:
                self._check_version(version)
                self._frozen = version
            tensors, arrays = self._collect(), self._arenas.arrays
            began = time.monotonic()
            self._copy_out(tensors, deadline)
            copied = time.monotonic()
            digests = digest_chunks(arrays, self._chunks, threads=self._threads)
        except BaseException:
            self._hold.release(push)
            raise
        self._check_open()
        return self._describe(version, digests, (copied - began, time.monotonic() - copied))

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

    def _describe(self, version: int, digests: bytes, seconds: tuple[float, float]) -> Frozen:
        manifest = Manifest(
            version=version, layout=self.layout.digest, chunk_nbytes=self._chunk_nbytes,
            digests=digests.hex(), digest=version_digest(digests),
        )  # fmt: skip
        regions = tuple(region.record() for region in self._arenas.regions)
        holder = Holder(name=self._agent.name, incarnation=self._agent.incarnation, regions=regions)
        return Frozen(
            manifest=manifest, holder=holder, nbytes=self.layout.nbytes,
            copy_out_seconds=seconds[0], digest_seconds=seconds[1],
        )  # fmt: skip

    def _collect(self) -> Tensors:
        """Return the tensors as they are now; a trainer may have replaced some by others of the same kind."""
        tensors = collect(self._source)
        known = self.layout.by_name
        changed = [name for name, tensor in tensors.items() if name not in known or not self._is_like(name, tensor)]
        changed += [name for name in known if name not in tensors]
        if changed:
            raise ConfigError(
                f"{len(changed)} tensors of {self.name!r} are not what was published: {', '.join(changed[:5])}",
                hint="close the publication and publish the changed model",
            )
        return tensors

    def _is_like(self, name: str, tensor: torch.Tensor) -> bool:
        entry = self.layout.by_name[name]
        return (dtype_name(tensor), tuple(tensor.shape)) == (entry.dtype, entry.shape)

    def _copy_out(self, tensors: Tensors, deadline: float) -> None:
        with self.updating(timeout=max(0.0, deadline - time.monotonic())):
            self._check_open()
            sources: dict[tuple[int, int], str] = {}
            for name, tensor in tensors.items():
                first = sources.setdefault(self.layout.by_name[name].place, name)
                if tensor.numel() and not is_tied(tensors[first], tensor):
                    raise ConfigError(
                        f"{name!r} and {first!r} were tied when {self.name!r} was published, and are no more",
                        hint="close the publication and publish the changed model",
                    )
            copy_tensors(self._agent, [(self._view(name), tensors[name]) for name in sources.values()])

    def _view(self, name: str) -> torch.Tensor:
        """Return where a tensor lies in the arenas; made once."""
        view = self._views.get(name)
        if view is None:
            view = self._views[name] = self._arenas.tensor(self.layout.by_name[name])
        return view

    def _on_freeze(self, peer: str, payload: bytes) -> bytes:
        return self.freeze(Freeze.from_bytes(payload), peer).to_bytes()

    def _on_release(self, _peer: str, payload: bytes) -> bytes:
        request = Release.from_bytes(payload)
        if self._hold.release(request.push) and request.committed:
            with self._versions:
                self._committed = max(self._committed, self._frozen)
        return b""

    def _on_layout(self, _peer: str, payload: bytes) -> bytes:
        if payload.decode(errors="replace") != self.layout.digest:
            raise IntegrityError(f"{self.name!r} is not published with that layout any more", hint="push again")
        return self.layout.to_bytes()

    def _on_status(self, _peer: str, _payload: bytes) -> bytes:
        return str(self._committed).encode()


def publish(
    agent: Agent, name: str, source: Model, *, copy_threads: int | None = None, chunk_nbytes: int = CHUNK_NBYTES
) -> Publication:
    """Offer the weights of a module or state dict to `WeightSync` under a name. Nothing moves yet.

    Parameters and persistent buffers are carried, tied ones once. `copy_threads` digest them (the agent's by default).

    Raises:
        ConfigError: the name is unusable or taken, or the model holds what cannot be carried.
        RangeError: the host has too little memory for a copy of it.
    """
    threads = agent.config.copy_threads if copy_threads is None else copy_threads
    if threads < 1 or not 4096 <= chunk_nbytes <= 1 << 40:
        raise ConfigError(
            f"{threads} copy threads, chunks of {chunk_nbytes} bytes", hint="use 1 or more, and 4 KiB or more"
        )
    return Publication(agent, name, source, threads=threads, chunk_nbytes=chunk_nbytes)
