"""The network of an agent: what the ucx backend needs once the first peer is met, loaded only then."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from raynixl.backends.base import Binding, Local, Op, Request
from raynixl.backends.link import Links
from raynixl.backends.shm import addresses as address_table
from raynixl.backends.ucx_answers import Answers
from raynixl.backends.ucx_exports import Exports
from raynixl.backends.ucx_gpu import is_staged, ready_to_map
from raynixl.backends.ucx_guard import Guard, own_sources, sources
from raynixl.backends.ucx_key import Keys, unseal_workers
from raynixl.backends.ucx_lane import Lane, UcxBinding, UcxLink, probe_program
from raynixl.backends.ucx_options import Lanes
from raynixl.backends.ucx_rails import Paths, RailChoice, Rows, apart, cut, rows_of
from raynixl.backends.ucx_runtime import Runtime
from raynixl.backends.ucx_sockets import own_sockets
from raynixl.backends.ucx_wireup import Answer, Ask, Hello, Questions, Refusal, parse_wireup, unpack
from raynixl.blocks import refuse_overlap
from raynixl.errors import AgentClosed, PeerLost, TransferTimeout
from raynixl.memory import Memory, MemoryKind
from raynixl.native import Program
from raynixl.native.ucx import Rail, RemoteKey
from raynixl.region import Region, RemoteRegion
from raynixl.topology import Address

if TYPE_CHECKING:
    from raynixl.backends.ucx_staging import UcxStaging

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 0.05
GRACE_SECONDS = 0.1
"""How long UCX has to let go of an operation that was cancelled or is late, before its endpoint is closed by force."""
CLOSE_SECONDS = 5.0
LOOK_SECONDS = 0.1
_WORD = 0  # the number under which peers find the word that they read to see whether we are there
_HEARD = 1 << 63  # of the place where we read theirs; an `Ask` cannot name it


class Network:
    """Links to peers, lanes to their memory, and the regions that they may reach. UCX itself starts at the first lane.

    `memories` are the regions that the agent has so far, by number.
    """

    def __init__(self, local: Local, addresses: Sequence[Address], memories: Mapping[int, Memory]) -> None:
        self._local = local
        self._addresses = addresses
        self._lock = threading.Lock()  # protects _is_closed
        self._starting = threading.Lock()  # held while UCX is started, so that it is started once
        self._runtime: Runtime | None = None
        self._guard = Guard(local.name)
        self._is_closed = False
        self._is_sweeping = False  # on the reactor's thread
        self._has_warned = False
        self._next_look = 0.0
        self._word = ctypes.create_string_buffer(local.incarnation.encode(), 32)
        self._heard = ctypes.create_string_buffer(32)
        self._links = Links(local)
        self._open: set[UcxLink] = set()  # those with a lane, on the reactor's thread
        self._questions = Questions()
        self.exports = Exports(local, self._rails, lambda memory: ready_to_map(memory, self._run()))
        self.exports.add(_WORD, _memory_of(self._word))
        self.exports.add(_HEARD, _memory_of(self._heard))
        for number, memory in memories.items():
            self.exports.add(number, memory)
        self._answers = Answers(
            local, self.exports, workers=self.worker_addresses, window=lambda: self._run().read_window
        )
        self._choice = RailChoice(local.config.rails)
        self._staging: UcxStaging | None = None  # until something is staged
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        local.reactor.add(self._bell, self._on_bell)

    def join(self, sock: socket.socket, peer: str, incarnation: str) -> UcxLink:
        """Make the link of a connection whose other end has proved itself."""
        link = UcxLink(self._local, sock, peer=peer, incarnation=incarnation, on_control=self._on_control)
        self._links.add(link)
        link.guard = self._guard
        link.open()
        hello = Hello(host=self._local.host, pid=os.getpid(), addresses=own_sources(self._addresses))
        with contextlib.suppress(PeerLost):  # they have left already: the link is about to hear of it
            link.send_control(hello.model_dump_json().encode())
        return link

    def admit(self, sock: socket.socket, peer: str, incarnation: str) -> None:
        """Take in a peer that has connected, on the reactor's thread, and tell the agent."""
        self._links.admit(incarnation, lambda: self._welcome(sock, peer, incarnation))

    def bind(self, link: UcxLink, remote: RemoteRegion) -> UcxBinding:
        """Ask the peer for the region's keys and hand them to UCX; makes the lane if there is none."""
        deadline = time.monotonic() + self._local.config.connect_timeout
        self._rails()
        answer = self._ask(link, remote.id, deadline)
        keys = Keys.unseal(
            unpack(answer.sealed), incarnation=remote.incarnation, region=remote.id, nbytes=remote.nbytes
        )
        lane = self._lane(link, answer, deadline)
        lanes = lane.lanes.reaching(remote.kind, answer.slow)
        binding = UcxBinding(
            remote, link, self._local.native.Gate(), str(lanes), keys.address, None, lane, lane.unpack(keys)
        )
        binding.slow = answer.slow
        lane.add(binding)
        self._warn_once(link, lanes)
        return binding

    def prepare(self, request: Request) -> list[Program]:
        """Turn a request into one program over all rails that it uses, and one for what of ours is staged."""
        bindings = [own(binding) for binding in request.remote]
        link = own_link(request.remote[0])
        table = address_table(request)
        if link.pid == os.getpid():
            refuse_overlap(table)
        runtime = self._run()
        connected = sorted(set(bindings[0].keys).intersection(*(binding.keys for binding in bindings[1:])))
        if not connected:  # released meanwhile
            raise PeerLost(f"the connection with {link.peer!r} was lost meanwhile", peer=link.peer)
        rails = self._choice.rails_for(request.local[0].memory, runtime.devices, runtime.nics, connected=connected)
        staged = [self._is_staged(region, bindings) for region in request.local]
        make = {False: self._straight, True: self._stage}
        return [
            make[is_staged](request, *cut(rows, rails)) for is_staged, rows in apart(rows_of(request, table), staged)
        ]

    def _straight(self, request: Request, rows: Rows, paths: Paths) -> Program:
        """Compile rows of (path, our address, the peer's, nbytes) between memory that UCX reaches at both ends."""
        found = _ways(request, paths)
        mappings = {number: self.exports.mappings(request.local[number].id) for number in {one[0] for one in found}}
        ways = [(mappings[number][rail], key) for number, rail, key in found]
        native, limit = self._local.native, self._local.config.inline_nbytes
        return native.rma(request.op is Op.WRITE, ways, rows, request.gates, limit)

    def path(self, local: Region, binding: Binding) -> str:
        """Name the transports between two pieces of memory; ours is the host's where it is staged."""
        lane = own(binding).lane
        if lane is None:
            return binding.path
        near = MemoryKind.DRAM if self._is_staged(local, [own(binding)]) else local.kind
        return str(lane.lanes.reaching(binding.remote.kind, own(binding).slow, near))

    def describe(self, local: Region, binding: Binding) -> str:
        """Say which rails carry a region's bytes and why, whether UCX emulates, and list all transports."""
        runtime, lane = self._run(), own(binding).lane
        if lane is None:
            return ""
        connected = [way.rail for way in lane.ways]
        rails = self._choice.describe(local.memory, runtime.devices, runtime.nics, connected=connected)
        is_staged = self._is_staged(local, [own(binding)])
        near = MemoryKind.DRAM if is_staged else local.kind
        lanes = lane.lanes.reaching(binding.remote.kind, own(binding).slow, near)
        staged = f"; {local.label} is staged through pinned memory" if is_staged else ""
        return f"{rails}; {lanes.explain()}{staged}"

    def _stage(self, request: Request, rows: Rows, paths: Paths) -> Program:
        """Compile rows of (path, our address, the peer's, nbytes) between a GPU of ours and what UCX reaches."""
        from raynixl.backends.ucx_staging import Legs, UcxStaging

        with self._starting:
            if self._is_closed:
                raise AgentClosed(f"agent {self._local.name!r} is closed")
            if self._staging is None:
                self._staging = UcxStaging(self._local, self._rails)
            staging = self._staging
        return staging.program(request, Legs(rows, [(rail, key) for _, rail, key in _ways(request, paths)]))

    def _is_staged(self, local: Region, bindings: Sequence[UcxBinding]) -> bool:
        """Whether our memory goes through buffers because a lane does not reach it: only a GPU's does."""
        if local.kind is MemoryKind.DRAM:
            return False
        lanes = [
            one.lane.lanes.reaching(one.remote.kind, one.slow, local.kind) for one in bindings if one.lane is not None
        ]
        return is_staged(local.kind, is_direct=not any(one.is_emulation for one in lanes))

    def own_lanes(self) -> Lanes:
        """Start UCX, and return by which transports it reaches this very process.

        Raises:
            BackendUnavailable: it does not start, or the user's settings leave no usable transport.
        """
        return self._run().lanes

    def close(self) -> None:
        """Close every link and let UCX go; idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._local.reactor.remove(self._bell)
        self._guard.close()
        self._links.close()
        with self._starting:
            staging, self._staging = self._staging, None
        if staging is not None:
            staging.close(CLOSE_SECONDS)
        with self._starting:
            runtime, self._runtime = self._runtime, None
        if runtime is not None:
            self._end(runtime)
        self.exports.unmap_all()
        self.exports.forget_all()
        os.close(self._bell)

    def worker_addresses(self) -> Sequence[bytes]:
        """Return where peers find our workers; starts UCX if need be."""
        return self._run().addresses

    def _run(self) -> Runtime:
        """Return the runtime, started now if need be, which takes half a second."""
        runtime = self._runtime
        if runtime is not None:
            return runtime
        with self._starting:
            if self._is_closed:
                raise AgentClosed(f"agent {self._local.name!r} is closed")
            if self._runtime is None:
                self._runtime = Runtime(self._local, self._bell, self._guard)
            return self._runtime

    def _rails(self) -> Sequence[Rail]:
        return self._run().rails

    def _end(self, runtime: Runtime) -> None:
        if runtime.close(CLOSE_SECONDS) and self._guard.cut(CLOSE_SECONDS):
            self.exports.unmap_all()
            runtime.destroy()
        else:
            runtime.abandon()
            self._guard.sever()

    def _welcome(self, sock: socket.socket, peer: str, incarnation: str) -> None:
        if self._is_closed:
            sock.close()
            return
        self._local.events.link_opened(self.join(sock, peer, incarnation))

    def _ask(self, link: UcxLink, region: int, deadline: float) -> Answer:
        """Ask a peer for the keys of a region.

        Raises:
            PeerLost, TransferTimeout, RaynixlError: no answer came, or it was no.
        """
        number, question = self._questions.add(link)
        try:
            link.send_control(Ask(number=number, region=region).model_dump_json().encode())
            self._local.reactor.run_until(lambda: question.is_over, deadline)
        finally:
            self._questions.drop(number)
        if isinstance(question.answer, Answer):
            return question.answer
        if question.answer is not None:
            raise question.answer.to_error(link.peer)
        if link.lost is not None:
            raise link.lost.afresh()
        raise TransferTimeout(
            f"peer {link.peer!r} did not say in time how UCX reaches its region {region}",
            hint="it is frozen or overloaded", peer=link.peer,
        )  # fmt: skip

    def _lane(self, link: UcxLink, answer: Answer, deadline: float) -> Lane:
        """Return the link's lane, made now if there is none that works; one thread at a time binds a peer's regions."""
        lane = link.lane
        if lane is not None and lane.is_usable:
            return lane
        self._await_hello(link, deadline)
        workers = unseal_workers(unpack(answer.workers), incarnation=link.incarnation)
        runtime = self._run()
        lane = Lane(link.peer, runtime.rails, workers, runtime.reader)
        lane.limit_reads(answer.window)
        link.lane = lane
        if link.lost is not None:
            link.lane = None
            lane.fail()
            raise link.lost.afresh()
        self._local.reactor.call_soon(lambda: self._open.add(link))
        if not link.pid:
            self._watch(link, lane, deadline)
        return lane

    def _await_hello(self, link: UcxLink, deadline: float) -> None:
        """Wait until the peer is admitted to our own ports: its UCX may connect, too, when ours does."""
        self._local.reactor.run_until(lambda: link.is_introduced or link.lost is not None, deadline)
        if link.lost is not None:
            raise link.lost.afresh()
        if not link.is_introduced:
            raise TransferTimeout(f"peer {link.peer!r} did not introduce itself", peer=link.peer)

    def _watch(self, link: UcxLink, lane: Lane, deadline: float) -> None:
        """Find out later whether a silent peer of another host is there: by reading a word of its memory."""
        answer = self._ask(link, _WORD, deadline)
        keys = Keys.unseal(unpack(answer.sealed), incarnation=link.incarnation, region=_WORD, nbytes=len(self._word))
        rail, key = next(iter(lane.unpack(keys).items()))
        here = self.exports.mappings(_HEARD)[rail]
        lane.watch_by(probe_program(self._local, here, ctypes.addressof(self._heard), key.read, keys))
        patience = self._local.config.heartbeat_timeout
        # By way of the link, which lets go of its lane when it ends: whoever remembers it must not keep UCX's workers.
        link.probe = lambda: (current := link.lane) is not None and current.is_silent(patience)

    def _warn_once(self, link: UcxLink, lanes: Lanes) -> None:
        if lanes.is_emulation and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "UCX reaches %r over %s: the peer's UCX thread takes part in each operation; see docs/networking.md",
                link.peer, lanes,
            )  # fmt: skip

    # What comes in, on the reactor's thread

    def _on_control(self, link: object, body: bytes) -> None:
        assert isinstance(link, UcxLink)
        match parse_wireup(body):
            case Hello() as hello:
                link.admit(sources(hello.addresses, link.remote))
                if hello.host == self._local.host:
                    link.watch_process(hello.pid)
            case Ask() as ask:
                self._answers.give(link, ask)
            case Answer() | Refusal() as answer:
                if not self._questions.take(link, answer):
                    self._local.events.message_dropped("late answer")

    def _on_bell(self, _mask: int) -> None:
        """Hear from the core that an endpoint has failed, or that there are jobs to look after."""
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            return
        self._look_after_lanes()
        if not self._is_sweeping:
            self._is_sweeping = True
            self._local.reactor.call_later(SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        runtime = self._runtime
        self._discard_unsent()  # before endpoints are reset
        self._is_sweeping = runtime is not None and runtime.sweep(GRACE_SECONDS)
        self._look_after_lanes()
        if self._is_sweeping:
            self._local.reactor.call_later(SWEEP_SECONDS, self._sweep)

    def _discard_unsent(self) -> None:
        """See to the connections that UCX has made since; now and then, for it looks at every descriptor there is."""
        now = time.monotonic()
        lanes = [link.lane for link in self._open if link.lane is not None and link.lane.is_unguarded]
        if lanes and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            sockets = list(own_sockets())
            for lane in lanes:
                lane.discard_unsent(sockets)

    def _look_after_lanes(self) -> None:
        """Fail the lanes of which an endpoint has failed; their links stand, and the next transfer makes new ones."""
        for link in list(self._open):
            lane = link.lane
            if lane is not None and lane.needs_care:
                logger.debug("the lane to %r has failed: %s", link.peer, [one.status for one in lane.endpoints])
                lane.fail()
            if lane is None or not lane.is_usable:
                self._open.discard(link)


def own(binding: Binding) -> UcxBinding:
    """Return a binding as what it is here."""
    assert isinstance(binding, UcxBinding)
    return binding


def _ways(request: Request, paths: Paths) -> list[tuple[int, int, RemoteKey]]:
    """Return the number of our region, the rail, and the key of the peer's region on it, of each path."""
    is_write, keys = request.op is Op.WRITE, [own(binding).keys for binding in request.remote]
    found = [(region, rail, keys[binding][rail]) for region, binding, rail in paths.tolist()]
    return [(region, rail, key.write if is_write else key.read) for region, rail, key in found]


def own_link(binding: Binding) -> UcxLink:
    """Return a binding's link as what it is here."""
    assert isinstance(binding.link, UcxLink)
    return binding.link


def _memory_of(buffer: ctypes.Array[ctypes.c_char]) -> Memory:
    return Memory(MemoryKind.DRAM, 0, ctypes.addressof(buffer), len(buffer), True, buffer)
