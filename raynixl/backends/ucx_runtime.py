"""UCX in this process: a context and a worker for each rail, served by a thread of ucxx that needs no Python."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raynixl.backends.base import Local
from raynixl.backends.ucx_devices import check_names, check_ports, network_devices, setting, tcp_devices
from raynixl.backends.ucx_guard import Guard
from raynixl.backends.ucx_options import Lanes, blame, merge, read_window, with_send_buffer
from raynixl.backends.ucx_presence import INSTALL
from raynixl.config import kept_variables, variables
from raynixl.cuda import current_functions
from raynixl.errors import AgentClosed, BackendUnavailable
from raynixl.native import CLOSED
from raynixl.native.twin_cuda import take_cuda_context
from raynixl.native.ucx import Rail
from raynixl.topology import Nic, NicKind, nics

logger = logging.getLogger(__name__)

_FOREVER_MS = -1
_USUAL_SEND_BUFFER = 212_992
_LEFT: list[Any] = []
"""Workers that UCX would not let go of in time: destroying them under its feet would crash, so they stay."""


def load_ucxx() -> Any:
    """Import ucxx, and with it UCX, without what it writes into the environment.

    Raises:
        BackendUnavailable: it is not installed, or does not load.
    """
    try:
        with kept_variables("UCX_"):
            from ucxx._lib import libucxx
    except (ImportError, OSError) as exc:
        raise BackendUnavailable(f"ucxx does not load: {exc}", hint=INSTALL) from exc
    return libucxx


def library_version() -> str:
    """Return the version of the UCX that is loaded."""
    ucp = ctypes.CDLL("libucp.so.0")
    ucp.ucp_get_version_string.restype = ctypes.c_char_p
    return str(ucp.ucp_get_version_string().decode())


@dataclass(slots=True, eq=False)
class _Worker:
    """One worker of UCX: a rail with the objects of ucxx that it stands on."""

    device: str
    context: Any
    worker: Any
    rail: Rail
    is_served_by_ucxx: bool

    def destroy(self) -> None:
        """Touch it no more; UCX destroys it when its last reference goes."""
        self.rail.release()
        if self.is_served_by_ucxx:
            self.worker.stop_progress_thread()


class Runtime:
    """The rails of one agent. Made at the first use of the network, and closed with the agent.

    Each rail has two workers: one posts what we read and write, and the other serves what peers read and write here,
    and is the one whose address they know. With one worker for both UCX joins the two directions into one connection
    over TCP, and then crashes when an endpoint is closed by force while the peer is writing or being answered. Where
    UCX emulates reads, a third worker posts these: UCX crashes a target that answers a read over a connection by which
    it is being written to (uct_tcp_ep_progress_put_rx misses the buffer that a waiting answer has taken away).

    Raises:
        BackendUnavailable: ucxx does not load, or the user's settings leave no usable transport.
    """

    def __init__(self, local: Local, bell: int, guard: Guard) -> None:
        began = time.monotonic()
        self._local = local
        self._guard = guard
        self._ucxx = load_ucxx()
        self.nics: list[Nic] = nics()
        self._workers: list[_Worker] = []
        self._servers: list[_Worker] = []
        self._readers: dict[int, _Worker] = {}
        self._bell = bell
        self._is_closed = False
        self._lock = threading.Lock()  # protects _readers, _is_closed; held while a reader is made
        self._is_in_cuda = False
        try:
            for device in self._devices():
                self._start(device)
            self.lanes = self._try_out()
        except BaseException:
            if self.close(1.0):
                self.destroy()
            else:
                self.abandon()
            raise
        self.addresses = [one.rail.address for one in self._servers]
        logger.debug("UCX %s started in %.2f s: %s", library_version(), time.monotonic() - began, self)

    def __repr__(self) -> str:
        return f"Runtime({', '.join(one.device or 'all devices' for one in self._workers)}; {self.lanes})"

    @property
    def rails(self) -> Sequence[Rail]:
        """The rails; a peer's rail i is reached from ours of the same number, round and round."""
        return [one.rail for one in self._workers]

    def reader(self, number: int) -> Rail:
        """Return what posts the emulated reads of a rail, made now if need be.

        Raises:
            AgentClosed: nobody would close what it posts any more.
            BackendUnavailable: UCX makes no further worker.
        """
        with self._lock:
            if self._is_closed:
                raise AgentClosed(f"agent {self._local.name!r} is closed")
            if number not in self._readers:
                one = self._workers[number]
                options = self._options(one.device)
                self._readers[number] = self._add_worker(one.context, one.device, options, _resources(one.context))
            return self._readers[number].rail

    @property
    def _all(self) -> list[_Worker]:
        return [*self._workers, *self._readers.values(), *self._servers]

    @property
    def devices(self) -> Sequence[str]:
        """The network device of each rail, '' for one that may use all."""
        return [one.device for one in self._workers]

    @property
    def transports(self) -> Sequence[str]:
        """What UCX may choose from, as 'tcp/eth0' or 'cuda_copy/cuda'."""
        return sorted({name for one in self._workers for name in _resources(one.context)})

    @property
    def settings(self) -> str:
        """The settings that decide on the transports, for a message."""
        return self._said("")

    @property
    def version(self) -> str:
        """The version of UCX."""
        return library_version()

    def enter_cuda(self, context: int) -> None:
        """Have whoever drives UCX from now on do so in a CUDA context; the first of this process counts."""
        if self._is_in_cuda:
            return
        self._is_in_cuda = True
        self._local.native.enter_cuda(context, *current_functions())
        with self._lock:
            workers = self._all
        for one in workers:
            if one.is_served_by_ucxx:  # its thread runs no code of ours but when it starts
                one.worker.stop_progress_thread()
                _serve_by_ucxx(one.worker)

    def sweep(self, grace: float) -> bool:
        """Look after the jobs of every rail; whether to come again."""
        busy = [one.rail.sweep(grace) for one in self._all]  # each one
        return any(busy)

    def close(self, timeout: float) -> bool:
        """Close every endpoint; False if UCX did not let go of all: then the workers stay for good."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._is_closed = True
            rails = [one.rail for one in self._all]
        for rail in rails:
            rail.close(0.0)  # what goes over several ends when the endpoints of all are closed
        closed = [rail.close(max(0.0, deadline - time.monotonic())) for rail in rails]  # each one
        return all(closed)

    def destroy(self) -> None:
        """Destroy the workers; keys and mappings have been given back."""
        for one in self._take_all():
            one.destroy()

    def abandon(self) -> None:
        """Leave the workers as they are, for as long as the process lives."""
        logger.error("UCX does not let go of an endpoint of agent %r: its worker stays", self._local.name)
        _LEFT.extend(self._take_all())

    def _take_all(self) -> list[_Worker]:
        with self._lock:
            found = self._all
            self._workers, self._servers, self._readers = [], [], {}
        return found

    def _devices(self) -> Sequence[str]:
        """Return what each rail is restricted to: the configured devices, or several RDMA devices, or nothing."""
        given, environment = self._local.config, variables("UCX_")
        if given.rails:
            return given.rails
        if "NET_DEVICES" in given.ucx or "UCX_NET_DEVICES" in environment or not self._has_secret:
            return ("",)
        usable = [nic for nic in self.nics if nic.kind is NicKind.RDMA and nic.is_active]
        fastest = max((nic.speed_gbps for nic in usable), default=0.0)
        fast = [nic.device for nic in usable if 2 * nic.speed_gbps >= fastest]
        offered = self._offered() if len(fast) > 1 else frozenset()
        rails = [device for device in fast if device in offered]
        return rails if len(rails) > 1 else ("",)

    def _offered(self) -> frozenset[str]:
        """Return the names of network devices that this UCX has a transport for (the wheel has none for RDMA)."""
        return frozenset(network_devices(_resources(self._make_context(self._options("")))))

    @property
    def _has_secret(self) -> bool:
        return bool(self._local.config.secret.get_secret_value())

    def _start(self, device: str) -> None:
        options = self._options(device)
        try:
            context = self._make_context(options)
        except BackendUnavailable:
            self._check_names(device, options, [])
            raise
        resources = _resources(context)
        self._check_names(device, options, resources)
        for workers in (self._workers, self._servers):
            workers.append(self._add_worker(context, device, options, resources))

    def _add_worker(self, context: Any, device: str, options: Mapping[str, str], resources: Sequence[str]) -> _Worker:
        listening = tcp_devices(resources)
        check_ports(setting("TCP_PORT_RANGE", options, variables("UCX_")), listening)
        return self._make_worker(context, device, ports=len(listening))

    def _make_worker(self, context: Any, device: str, *, ports: int) -> _Worker:
        with self._guard.watch() as adopt:
            try:
                worker = self._ucxx.UCXWorker(context)
            except self._errors() as exc:
                raise self._unusable(device, exc) from exc
            rail = self._local.native.Rail(context.handle, worker.handle, self._bell)
            has_thread = rail.serve()
            if not has_thread:
                _serve_by_ucxx(worker)
            adopt(rail.address, ports)
        return _Worker(device, context, worker, rail, not has_thread)

    def _check_names(self, device: str, options: Mapping[str, str], resources: Sequence[str]) -> None:
        said = (device, f"rails={device!r}") if device else setting("NET_DEVICES", options, variables("UCX_"))
        check_names(said, resources, lambda: self._all_resources(options))

    def _all_resources(self, options: Mapping[str, str]) -> Sequence[str]:
        try:
            return _resources(self._make_context({**options, "NET_DEVICES": "all"}))
        except BackendUnavailable:  # it is not the devices
            return ()

    def _make_context(self, options: Mapping[str, str]) -> Any:
        feature = self._ucxx.Feature
        features = (feature.RMA, feature.AM, feature.WAKEUP)
        try:
            return self._ucxx.UCXContext(dict(options), feature_flags=features)
        except self._errors() as exc:
            raise self._unusable(options.get("NET_DEVICES", ""), exc) from exc

    def _options(self, device: str) -> dict[str, str]:
        environment = variables("UCX_")
        options = merge(self._local.config.ucx, environment, device=device, is_local=not self._has_secret)
        most = _largest_send_buffer()
        options = with_send_buffer(options, environment, most)
        self.read_window = read_window(options, environment, most)
        level = options.pop("LOG_LEVEL", "")  # not an option of a context, but of the whole library
        if level:
            _set_global("LOG_LEVEL", level)
        return options

    def _try_out(self) -> Lanes:
        """Make an endpoint to ourselves: with settings that leave no usable transport UCX refuses it."""
        found: list[str] = []
        with self._guard.open_to_ourselves():
            for one, server in zip(self._workers, self._servers, strict=True):
                found += self._transports_of(one, server)
        return Lanes.of(found)

    def _transports_of(self, one: _Worker, server: _Worker) -> list[str]:
        try:
            endpoint = one.rail.connect(server.rail.address)
        except RuntimeError as exc:
            raise self._unusable(one.device, exc) from exc
        found = endpoint.transports
        endpoint.close(CLOSED)
        return found

    def _unusable(self, device: str, error: Exception) -> BackendUnavailable:
        return BackendUnavailable(
            f"{self._said(device)} leaves UCX no usable transport: {error}",
            hint="TLS must name tcp or an InfiniBand transport (cma alone has no error handling), and NET_DEVICES an "
            "interface that exists; `raynixl doctor` lists what there is",
        )

    def _said(self, device: str) -> str:
        environment = variables("UCX_")
        return blame(merge(self._local.config.ucx, environment, device=device, is_local=False), environment)

    def _errors(self) -> tuple[type[Exception], ...]:
        from ucxx import exceptions

        return (exceptions.UCXError, RuntimeError, ValueError, KeyError)


def _serve_by_ucxx(worker: Any) -> None:
    worker.set_progress_thread_start_callback(take_cuda_context, (), {})
    worker.start_progress_thread(polling_mode=False, epoll_timeout=_FOREVER_MS)


def _resources(context: Any) -> list[str]:
    """Return the transports of a context with their devices, as 'tcp/eth0'."""
    return [line.rpartition(" ")[2] for line in str(context.info).splitlines() if " resource " in line]


def _largest_send_buffer() -> int:
    """Return how large a send buffer the kernel grants, as far as it says."""
    try:
        return int(Path("/proc/sys/net/core/wmem_max").read_text("ascii"))
    except (OSError, ValueError):  # a network namespace does not show it, but has it
        return _USUAL_SEND_BUFFER


def _set_global(name: str, value: str) -> None:
    """Set an option of the whole library, which UCX reads from the environment when it is loaded."""
    ucs = ctypes.CDLL("libucs.so.0", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    if hasattr(ucs, "ucs_global_opts_set_value"):
        ucs.ucs_global_opts_set_value(name.encode(), value.encode())
