"""The shm backend: host memory of one host, by mapped arenas or by process_vm, and messages by Unix sockets."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import socket
import time
from collections.abc import Sequence

import numpy as np

from raynixl.backends.acceptor import Acceptor
from raynixl.backends.base import MAPPED, Binding, Capabilities, Link, Local, Op, Request
from raynixl.backends.greeting import Newcomer, greet
from raynixl.backends.link import Links
from raynixl.backends.permission import allow_same_user
from raynixl.backends.socket_link import SocketLink
from raynixl.backends.wire import PacketWire, peer_pid
from raynixl.blocks import Segments, refuse_overlap
from raynixl.errors import BackendUnavailable, PeerLost, TransferTimeout
from raynixl.memory import Memory, MemoryKind, address_of, check_sealed, map_shared
from raynixl.native import COPY, VM_READ, VM_WRITE, Program
from raynixl.record import AgentRecord
from raynixl.region import RemoteRegion

logger = logging.getLogger(__name__)
_DRAM = frozenset({(MemoryKind.DRAM, MemoryKind.DRAM)})


class ShmBackend:
    """Copies between two mapped ranges where the peer's memory is an arena, else calls process_vm_readv/writev.

    The target's process takes no part in a transfer. `process_vm` needs the same user (or ptrace permission);
    it is tried once for each link, on a word that the peer shows for it, before anything relies on it.
    """

    name = "shm"
    capabilities = Capabilities(kinds=_DRAM, messages=True)

    def __init__(self, local: Local) -> None:
        self._local = local
        self._word = ctypes.create_string_buffer(local.incarnation.encode())  # what peers read to try process_vm
        self._links = Links(local)
        if local.config.process_vm:
            refusal = allow_same_user()
            if refusal:
                logger.warning("peers cannot reach the plain memory of agent %r: %s", local.name, refusal)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(_address(local.incarnation))
        listener.listen(1024)
        self._acceptor = Acceptor(
            local, [listener], wire=PacketWire, probe=ctypes.addressof(self._word), admit=self._admit
        )

    def local_metadata(self) -> dict[str, str | int]:
        """Peers find the socket by the incarnation alone."""
        return {}

    def reaches(self, record: AgentRecord) -> str:
        """Only agents of this host, in the same network and process namespaces."""
        if self.name not in record.backends:
            return f"{record.name!r} does not offer it"
        return "" if record.host == self._local.host else f"{record.name!r} is on another host"

    def register(self, region_id: int, memory: Memory) -> dict[str, str | int]:
        """Nothing to pin: an arena travels as a descriptor, other memory as its address."""
        if memory.kind is not MemoryKind.DRAM:
            raise BackendUnavailable(f"shm carries host memory, not {memory.kind.value}")
        return {"arena": 1} if memory.fd >= 0 else {"address": memory.address}

    def deregister(self, region_id: int) -> None:
        """Nothing to unpin."""

    def connect(self, record: AgentRecord, deadline: float) -> Link:
        """Connect to the agent's socket and greet it."""
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as exc:
            raise BackendUnavailable(
                f"no socket for peer {record.name!r}: {exc.strerror}", hint="raise ulimit -n", peer=record.name
            ) from exc
        try:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            _knock(sock, record, deadline)
            word = ctypes.addressof(self._word)
            probe = greet(self._local, PacketWire(sock), record, probe=word, deadline=deadline)
            return self._open(sock, record.name, record.incarnation, probe)
        except BaseException:
            sock.close()
            raise

    def bind(self, link: Link, remote: RemoteRegion, fds: Sequence[int]) -> Binding:
        """Map the peer's arena, or take its address if process_vm works with this peer."""
        assert isinstance(link, SocketLink)
        key = remote.record.keys.get(self.name, {})
        if "arena" in key and fds:
            check_sealed(fds[0], remote.nbytes)
            try:
                mapping: mmap.mmap = map_shared(fds[0], remote.nbytes)
            except OSError as exc:
                raise BackendUnavailable(
                    f"{remote.label} cannot be mapped: {exc.strerror}", hint="free memory, or raise vm.max_map_count",
                    peer=link.peer,
                ) from exc  # fmt: skip
            return Binding(remote, link, self._local.native.Gate(), MAPPED, address_of(mapping), mapping)
        if "arena" in key:
            raise BackendUnavailable(
                f"the descriptor of {remote.label} did not arrive", hint="this process has no more: ulimit -n",
                peer=link.peer,
            )  # fmt: skip
        address = key.get("address")
        if not isinstance(address, int) or address + remote.nbytes > 1 << 64:
            raise BackendUnavailable(f"{remote.label} has no usable shm key", peer=link.peer)
        if link.vm_refusal:
            raise BackendUnavailable(
                f"{remote.label} is not an arena and process_vm does not work here: {link.vm_refusal}",
                hint="use memory from agent.empty(), or allow ptrace between the two processes", peer=link.peer,
            )  # fmt: skip
        return Binding(remote, link, self._local.native.Gate(), "process_vm", address)

    def prepare(self, request: Request) -> list[Program]:
        """Turn a request into one native program for each path that its regions take."""
        mapped = np.array([binding.path == MAPPED for binding in request.remote])
        side = request.segments.target_region if request.op is Op.WRITE else request.segments.source_region
        programs = []
        for is_mapped in (False, True):
            if not (mapped == is_mapped).any():
                continue
            rows = None if (mapped == is_mapped).all() else mapped[side] == is_mapped
            programs.append(self._program(request, rows, COPY if is_mapped else _VM_MODE[request.op]))
        return programs

    def close(self) -> None:
        """Stop listening and close every link."""
        if not self._acceptor.is_closed:
            self._acceptor.close()
            self._links.close()

    def _program(self, request: Request, rows: np.ndarray[tuple[int], np.dtype[np.bool_]] | None, mode: int) -> Program:
        link = request.remote[0].link
        assert isinstance(link, SocketLink)
        table = addresses(request)
        if link.pid == os.getpid():
            refuse_overlap(table)
        return self._local.engine.program(mode, link.pid, table if rows is None else table[rows], request.gates)

    def _open(self, sock: socket.socket, peer: str, incarnation: str, probe: int) -> SocketLink:
        link = SocketLink(self._local, sock, peer=peer, incarnation=incarnation, pid=peer_pid(sock))
        link.vm_refusal = self._try_process_vm(link.pid, probe, incarnation)
        self._links.add(link)
        link.open()
        return link

    def _try_process_vm(self, pid: int, probe: int, incarnation: str) -> str:
        """Read the word that the peer shows; return '' if it says what it should."""
        if not self._local.config.process_vm:
            return "it is switched off here: AgentConfig.process_vm"
        seen = np.zeros(32, np.uint8)
        # Two halves: a single small block would go by the process's memory file, which other rules apply to.
        at = seen.ctypes.data
        table = np.array([[probe, at, 16], [probe + 16, at + 16, 16]], np.uint64)
        result = self._local.engine.program(VM_READ, pid, table, []).run(GREETING_SECONDS)
        if not isinstance(result, int):  # with inline_nbytes=0 even this is a job
            result.wait_settled(GREETING_SECONDS)
            result = result.code
        if result < 0:
            return f"process_vm_readv fails with errno {-result}"
        return "" if seen.tobytes() == incarnation.encode() else "the process id means another process here"

    def _admit(self, newcomer: Newcomer) -> None:
        assert newcomer.client is not None
        self._links.admit(newcomer.client.incarnation, lambda: self._take_in(newcomer))

    def _take_in(self, newcomer: Newcomer) -> None:
        assert newcomer.client is not None
        if self._acceptor.is_closed:
            newcomer.sock.close()
            return
        client = newcomer.client
        self._local.events.link_opened(self._open(newcomer.sock, client.name, client.incarnation, newcomer.peer_probe))


GREETING_SECONDS = 1.0
_VM_MODE = {Op.READ: VM_READ, Op.WRITE: VM_WRITE}


def _address(incarnation: str) -> str:
    """Return the abstract socket address of an incarnation: it leaves no file and ends with its process."""
    return f"\0raynixl/{incarnation}"


def _knock(sock: socket.socket, record: AgentRecord, deadline: float) -> None:
    try:
        sock.connect(_address(record.incarnation))
    except TimeoutError as exc:
        raise TransferTimeout(f"peer {record.name!r} does not accept connections", peer=record.name) from exc
    except (ConnectionRefusedError, FileNotFoundError) as exc:
        raise PeerLost(f"peer {record.name!r} (pid {record.pid}) is not running", peer=record.name) from exc
    except OSError as exc:  # a full queue of connections says EAGAIN: nobody has accepted for long
        raise TransferTimeout(f"peer {record.name!r} does not accept connections", peer=record.name) from exc
    if time.monotonic() > deadline:
        raise TransferTimeout(f"connecting to {record.name!r} took too long", peer=record.name)


def addresses(request: Request, at: Sequence[int] = ()) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    """Return the (N, 3) table of (source address, destination address, length) that the native core takes.

    `at` says where our regions lie, if not at their own addresses.
    """
    segments: Segments = request.segments
    ours = np.array(at or [region.memory.address for region in request.local], np.uint64)
    theirs = np.array([binding.address for binding in request.remote], np.uint64)
    source, target = (theirs, ours) if request.op is Op.READ else (ours, theirs)
    table = np.empty((len(segments), 3), np.uint64)
    np.add(source[segments.source_region], segments.source_offset, out=table[:, 0])
    np.add(target[segments.target_region], segments.target_offset, out=table[:, 1])
    table[:, 2] = segments.nbytes
    return table
