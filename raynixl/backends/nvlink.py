"""The nvlink backend: memory of GPUs on one host, by CUDA IPC and one kernel for a whole list of blocks."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raynixl import cuda
from raynixl.backends.base import MAPPED, Binding, Capabilities, Link, Local, Op, Request
from raynixl.backends.nvlink_export import export
from raynixl.backends.nvlink_host import PeerArena, Pins
from raynixl.backends.nvlink_import import IMPORTS
from raynixl.backends.nvlink_mover import mover
from raynixl.backends.nvlink_staging import StagedProgram, Staging
from raynixl.backends.shm import addresses
from raynixl.backends.silent_link import SilentLink
from raynixl.blocks import refuse_overlap
from raynixl.errors import BackendUnavailable, PeerLost
from raynixl.memory import Memory, MemoryKind
from raynixl.native import Gate, Program
from raynixl.record import AgentRecord
from raynixl.region import Region, RemoteRegion

logger = logging.getLogger(__name__)

_HERE: weakref.WeakValueDictionary[str, NvlinkBackend] = weakref.WeakValueDictionary()
"""Who is in this process, by incarnation: CUDA opens no handle in the process that made it."""
_DRAM, _VRAM = MemoryKind.DRAM, MemoryKind.VRAM
_KINDS = frozenset({(_VRAM, _VRAM), (_DRAM, _VRAM), (_VRAM, _DRAM)})


@dataclass(slots=True, eq=False)
class _Place:
    """Where a peer's region lies for us, and what is let go of when it goes."""

    gate: Gate
    device: int
    """The GPU whose context reaches it; -1 for host memory, which all of them do."""
    is_pinned: bool
    """Whether a GPU reaches it itself."""
    is_hidden: bool
    """Whether it is on a GPU that this process does not see."""
    held: Any = field(repr=False)
    places: set[_Place] = field(repr=False)

    def close(self) -> None:
        """Unmap it; no transfer is in flight there any more."""
        self.places.discard(self)
        held, self.held = self.held, None
        if held is not None:
            held.close()


class NvlinkBackend:
    """Moves bytes between memory of GPUs, and between that and host memory. The peer's process takes no part.

    Messages go over the agent's other links. CUDA is first touched when memory of a GPU is registered or bound: an
    agent that never meets any costs nothing, and its process may still fork.
    """

    name = "nvlink"
    capabilities = Capabilities(kinds=_KINDS, messages=False)

    def __init__(self, local: Local) -> None:
        self._local = local
        self._memories: dict[int, Memory] = {}
        self._links: weakref.WeakSet[SilentLink] = weakref.WeakSet()
        self._places: set[_Place] = set()
        self._warm: set[int] = set()  # GPUs that have carried out something
        self._pins = Pins()
        self._staging = Staging(local)
        self._lock = threading.Lock()  # protects _links, _is_closed
        self._is_closed = False
        _HERE[local.incarnation] = self

    def local_metadata(self) -> dict[str, str | int]:
        """Nothing: which GPUs there are is asked when a region is bound, since asking initialises CUDA."""
        return {}

    def reaches(self, record: AgentRecord) -> str:
        """Only agents of this host, where both have a driver."""
        if self.name not in record.backends:
            return f"{record.name!r} does not offer it"
        if not cuda.has_driver():
            return "the NVIDIA driver (libcuda.so.1) is not here"
        return "" if record.host == self._local.host else f"{record.name!r} is on another host"

    def register(self, region_id: int, memory: Memory) -> dict[str, str | int]:
        """Export memory of a GPU; of host memory an arena travels as a descriptor, other memory as its address."""
        if not cuda.has_driver():
            raise BackendUnavailable(
                "nvlink needs the NVIDIA driver (libcuda.so.1), which is not here", hint="see `raynixl doctor`"
            )
        if memory.kind is _VRAM:
            key = export(memory)
        elif memory.kind is _DRAM:
            key = {"arena": 1} if memory.fd >= 0 else {"address": memory.address}
        else:
            raise BackendUnavailable(f"nvlink carries memory of GPUs and hosts, not {memory.kind.value}")
        self._memories[region_id] = memory
        return key

    def deregister(self, region_id: int) -> None:
        """Unpin it; the agent has closed and drained it."""
        self._memories.pop(region_id, None)
        self._pins.release(region_id)

    def connect(self, record: AgentRecord, deadline: float) -> Link:
        """Note whose regions are bound: there is nobody to talk to."""
        link = SilentLink(self._local, record, backend=self.name)
        with self._lock:
            self._links.add(link)
            is_closed = self._is_closed
        if is_closed:
            raise PeerLost(f"agent {self._local.name!r} is closing", peer=record.name)
        return link

    def bind(self, link: Link, remote: RemoteRegion, fds: Sequence[int]) -> Binding:
        """Open the handle of the peer's memory, map and pin its arena, or take the address in this process."""
        assert isinstance(link, SilentLink)
        if not cuda.devices():  # as an actor of Ray's that has asked for none
            raise BackendUnavailable(
                "this process sees no GPU", hint="see nvidia-smi and CUDA_VISIBLE_DEVICES", peer=link.peer
            )
        key = remote.record.keys.get(self.name, {})
        gate = self._local.native.Gate()
        if remote.kind is _VRAM:
            address, device, path, held = self._reach(link, remote, key)
            is_pinned = True
        elif remote.kind is _DRAM:
            device = -1
            address, is_pinned, path, held = self._reach_host(link, remote, fds)
        else:
            raise BackendUnavailable(f"nvlink does not reach {remote.kind.value}", peer=link.peer)
        is_hidden = path == "ipc" and key.get("uuid") not in {one.uuid for one in cuda.devices()}
        place = _Place(gate, device, is_pinned, is_hidden, held, self._places)
        self._places.add(place)
        return Binding(remote, link, gate, path, address, place)

    def prepare(self, request: Request) -> list[Program]:
        """Turn a request into one program for what a GPU reaches itself, and one for what is staged."""
        device = self._device(request)
        with cuda.on(device):  # so that pinning makes no context on another GPU
            at = [self._pins.address_of(one) if one.kind is _DRAM else one.memory.address for one in request.local]
        near = np.array([address is not None for address in at])
        far = np.array([_place(binding).is_pinned for binding in request.remote])
        ours, theirs = request.segments.source_region, request.segments.target_region
        if request.op is Op.READ:
            ours, theirs = theirs, ours
        direct = near[ours] & far[theirs]
        where = [
            one.memory.address if address is None else address for address, one in zip(at, request.local, strict=True)
        ]
        table = addresses(request, where)
        if any(binding.path == "memory" for binding in request.remote):
            refuse_overlap(table)
        gpu = mover(device)
        self._warm.add(device)
        programs: list[Program] = []
        if direct.any():
            touches_host = any(one.kind is _DRAM for one in request.local) or -1 in self._devices(request)
            programs.append(gpu.program(table[direct], request.gates, touches_host=touches_host))
        if not direct.all():
            programs.append(self._staging.program(device, request, table[~direct]))
        return programs

    def copy(self, source: Region, target: Region, rows: NDArray[np.uint64]) -> list[Program]:
        """Compile copies between two regions of ours; see `CopiesHere`."""
        ends = (source, target)
        device = next(one.device for one in (target, source) if one.kind is _VRAM)
        with cuda.on(device):  # as in `prepare`
            at = [self._pins.address_of(one) if one.kind is _DRAM else one.memory.address for one in ends]
        for one in ends:
            if one.kind is _VRAM and one.device != device:
                _check_origin(device, one.memory.address, one.nbytes)
                cuda.enable_peer(device, one.device)
        starts = [one.memory.address if place is None else place for place, one in zip(at, ends, strict=True)]
        table = np.ascontiguousarray(rows + np.array([*starts, 0], np.uint64))
        gates = [one.gate for one in ends]
        self._warm.add(device)
        if None in at:
            return [StagedProgram(self._staging, device, table, gates, is_upload=target.kind is _VRAM)]
        return [mover(device).program(table, gates, touches_host=any(one.kind is _DRAM for one in ends))]

    def is_ready(self, local: Sequence[Region]) -> bool:
        """Whether kernels are compiled, which takes a second, and arenas pinned, 0.2 s for a GiB."""
        return all(
            self._pins.is_settled(region) if region.kind is _DRAM else region.device in self._warm for region in local
        )

    def reach(self, binding: Binding, device: int) -> int:
        """Return where kernels of a GPU reach a peer's region; see `ServesKernels`."""
        place = _place(binding)
        if place.device != device:
            if place.device < 0:
                raise BackendUnavailable(f"{binding.remote.label} is in no GPU's memory", peer=binding.link.peer)
            if place.is_hidden:
                raise BackendUnavailable(
                    f"{binding.remote.label} is on a GPU that this process does not see, opened for GPU {place.device}",
                    hint="have CUDA_VISIBLE_DEVICES name it, too", peer=binding.link.peer,
                )  # fmt: skip
            _check_origin(device, binding.address, binding.remote.nbytes)
            cuda.enable_peer(device, place.device)
        return binding.address

    def describe(self, local: Region, binding: Binding) -> str:
        """Say which GPU works, and what is staged."""
        lines = []
        place = _place(binding)
        if local.kind is _VRAM and place.device >= 0 and place.device != local.device:
            lines.append(f"GPU {local.device} reaches the memory of GPU {place.device}")
        if local.kind is _DRAM and self._pins.address_of(local) is None:
            lines.append(f"{local.label} is not pinned: staged; use agent.empty() or pinned memory")
        if not place.is_pinned and binding.path == MAPPED:
            lines.append(f"{binding.remote.label} cannot be pinned here: staged; see the log")
        elif not place.is_pinned:
            lines.append(f"{binding.remote.label} is no arena: staged; its owner should use agent.empty()")
        return "\n".join(lines)

    def close(self) -> None:
        """Close every link and let go of what is pinned, once no transfer is in flight there."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            links = list(self._links)
        _HERE.pop(self._local.incarnation, None)
        for link in links:
            link.close(PeerLost(f"agent {self._local.name!r} was closed", peer=link.peer))
        deadline = time.monotonic() + self._local.config.deregister_timeout
        self._staging.close(self._local.config.deregister_timeout)
        stuck = [place for place in list(self._places) if not place.gate.drain(max(0.001, deadline - time.monotonic()))]
        if stuck:  # what a GPU may still read or write must stay where it is
            logger.error(
                "a GPU does not end %d transfers of agent %r: their memory stays", len(stuck), self._local.name
            )
            return
        self._pins.close()
        self._memories.clear()

    def _reach(self, link: SilentLink, remote: RemoteRegion, key: dict[str, str | int]) -> tuple[int, int, str, Any]:
        """Return address, GPU, path and what holds them, of a peer's memory on a GPU."""
        if link.process == os.getpid():  # by its record, not by _HERE, of which forked children have copies
            memory = self._memory_here(link, remote)
            return memory.address, memory.device, "memory", None
        opened = IMPORTS.open(key, remote.nbytes, self._home())
        return opened.address, opened.device, "ipc", opened

    def _reach_host(self, link: SilentLink, remote: RemoteRegion, fds: Sequence[int]) -> tuple[int, bool, str, Any]:
        """Return address, whether it is pinned, path and what holds it, of a peer's memory in the host."""
        key = remote.record.keys.get(self.name, {})
        if "arena" in key:
            if not fds:
                raise BackendUnavailable(
                    f"the descriptor of {remote.label} did not arrive", hint="this process has no more: ulimit -n",
                    peer=link.peer,
                )  # fmt: skip
            with cuda.on(self._home()):  # likewise
                arena = PeerArena(fds[0], remote)
            return arena.address, arena.is_pinned, "pinned" if arena.is_pinned else MAPPED, arena
        if link.process != os.getpid():
            raise BackendUnavailable(
                f"{remote.label} is plain memory of another process, which no GPU here reaches",
                hint="its owner should use agent.empty()", peer=link.peer,
            )  # fmt: skip
        return self._memory_here(link, remote).address, False, "memory", None

    def _memory_here(self, link: SilentLink, remote: RemoteRegion) -> Memory:
        """Return a region's memory in this process, as its agent here knows it: what a peer says is no address of ours.

        Raises:
            PeerLost: no such agent is in this process.
            BackendUnavailable: it has no such region.
        """
        other = _HERE.get(remote.incarnation)
        if other is None:
            raise PeerLost(f"peer {link.peer!r} is no longer in this process", peer=link.peer)
        memory = other._memories.get(remote.id)
        if memory is None or memory.kind is not remote.kind or memory.nbytes < remote.nbytes:
            raise BackendUnavailable(f"{remote.label} is not in this process", peer=link.peer)
        return memory

    def _home(self) -> int:
        """Return the GPU that this agent works with: that of its first region there, else the first."""
        return next((one.device for one in list(self._memories.values()) if one.kind is _VRAM), 0)

    def _device(self, request: Request) -> int:
        """Return the GPU that carries a request out: ours, with access to the memory of the peer's."""
        near = {region.device for region in request.local if region.kind is _VRAM}
        far = [_place(binding) for binding in request.remote if _place(binding).device >= 0]
        hidden = {
            place.device for place in far if place.is_hidden
        }  # opened for one GPU of ours, which alone reaches it
        device = min(hidden or near or {place.device for place in far})
        if len(hidden) > 1:
            raise BackendUnavailable("memory of hidden GPUs was opened for several of ours", hint="transfer it apart")
        spans = [(one.device, one.memory.address, one.nbytes) for one in request.local if one.kind is _VRAM]
        spans += [(_place(one).device, one.address, one.remote.nbytes) for one in request.remote]
        for other, address, nbytes in spans:
            if other not in (-1, device):
                _check_origin(device, address, nbytes)
                cuda.enable_peer(device, other)
        return device

    @staticmethod
    def _devices(request: Request) -> set[int]:
        """Return the GPUs of the peer's regions; -1 stands for host memory."""
        return {_place(binding).device for binding in request.remote}


def _check_origin(device: int, address: int, nbytes: int) -> None:
    """Refuse memory of another GPU that peer access does not extend to: a kernel's touch would end the context.

    Raises:
        BackendUnavailable: it was not made by cudaMalloc.
    """
    origin = cuda.examine(address, nbytes).origin
    if origin is not cuda.Origin.MALLOC:
        raise BackendUnavailable(
            f"GPU {device} has no access to another GPU's memory by {origin.value}", hint=origin.remedy
        )


def _place(binding: Binding) -> _Place:
    assert isinstance(binding.state, _Place)
    return binding.state
