"""The binder: gets the consent of owners and binds their regions over the first backend that carries a transfer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from raynixl.agents.connection import Connection
from raynixl.backends.base import Backend, Binding, Link, is_ready
from raynixl.errors import BackendUnavailable, PeerLost, RaynixlError
from raynixl.region import Region, RemoteRegion, check_descriptor

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent
    from raynixl.agents.prepared import Kinds


class Claim(Protocol):
    """What wants a peer's regions bound: an operation, or a window."""

    @property
    def peer(self) -> str:
        """The owner's name."""

    @property
    def incarnation(self) -> str:
        """The owner's incarnation."""

    @property
    def remote(self) -> Sequence[RemoteRegion]:
        """The peer's regions."""

    @property
    def local(self) -> Sequence[Region]:
        """Ours, if there are any."""

    def kinds(self) -> Kinds:
        """Return the (local, remote) kinds of memory that take part."""

    def bind(self, bindings: Sequence[Binding]) -> object:
        """Take the bindings, in the order of `remote`.

        Raises:
            BackendUnavailable: this backend will not do after all.
        """


@dataclass(frozen=True, slots=True)
class _Consent:
    """An owner's consent to the use of a region, and how many it had withdrawn before."""

    withdrawals: int
    fds: Sequence[int]


@dataclass(slots=True)
class _Task:
    """One claim whose regions are bound with one peer, and the consents that it was given so far."""

    connection: Connection
    remotes: Sequence[RemoteRegion]
    kinds: Kinds
    deadline: float
    consents: dict[int, _Consent] = field(default_factory=dict)  # by id() of the remote region


class Binder:
    """Binds all regions of a transfer over one backend; one region may be bound over several, for different kinds."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def held(self, connection: Connection, claim: Claim) -> list[Binding] | None:
        """Return the bindings that are there already, as `bind` would choose them; never waits."""
        kinds, remotes = claim.kinds(), claim.remote
        for backend in self._agent.backends:
            if any(refusal(backend, remote, kinds) for remote in remotes):
                continue
            with connection.lock:
                keys = [(remote.id, remote.generation, backend.name) for remote in remotes]
                found = [connection.bindings.get(key) for key in keys]
                is_refused = any(key in connection.refusals for key in keys)
            wanted = zip(remotes, found, strict=True)
            bindings = [one for remote, one in wanted if one is not None and one.is_usable and one.remote == remote]
            if len(bindings) == len(remotes):
                return bindings if is_ready(backend, claim.local) else None
            if not is_refused:
                return None
        return None

    def bind(self, connection: Connection, claim: Claim, deadline: float) -> list[Binding]:
        """Bind what is not bound yet, compile for it, and return all bindings. Blocks; `connection.binding` is held.

        Raises:
            RaynixlError: whatever stands in the way.
        """
        task = _Task(connection, claim.remote, claim.kinds(), deadline)
        try:
            for remote in task.remotes:
                self._check(task, remote)
            return self._choose(task, claim)
        finally:
            for consent in task.consents.values():
                _close_all(consent.fds)

    def _check(self, task: _Task, remote: RemoteRegion) -> None:
        """Make sure that the region is as its owner knows it, before anything else is said of it."""
        held = (task.connection.held(remote, backend.name) for backend in self._agent.backends)
        first = next((binding for binding in held if binding is not None), None)
        if first is None:
            self._ask(task, remote)
        else:
            check_descriptor(remote, first.remote.record)

    def _choose(self, task: _Task, claim: Claim) -> list[Binding]:
        """Bind with the first backend that can carry these kinds of memory."""
        reasons = []
        for backend in self._agent.backends:
            reason = next((text for remote in task.remotes if (text := refusal(backend, remote, task.kinds))), "")
            if not reason:
                try:
                    link = self._link(task, backend)
                    bindings = [self._bind(task, backend, link, remote) for remote in task.remotes]
                    claim.bind(bindings)
                    return bindings
                except BackendUnavailable as exc:
                    reason = str(exc)
                    task.connection.refused(task.remotes, backend.name, reason)
            reasons.append(f"{backend.name}: {reason}")
        labels = ", ".join(dict.fromkeys(remote.label for remote in task.remotes[:3]))
        raise BackendUnavailable(
            f"no backend carries {kind_names(task.kinds)} to {labels} ({'; '.join(reasons)})",
            hint="see agent.explain() and `raynixl doctor`", peer=task.connection.name,
        )  # fmt: skip

    def _bind(self, task: _Task, backend: Backend, link: Link, remote: RemoteRegion) -> Binding:
        connection = task.connection
        held = connection.held(remote, backend.name)
        if held is not None:
            return held
        while True:
            consent = task.consents.get(id(remote)) or self._ask(task, remote)
            binding = backend.bind(link, remote, consent.fds)
            try:
                if connection.add_binding(binding, consent.withdrawals):
                    return binding
            except RaynixlError:
                binding.release()
                raise
            binding.release()  # a region was withdrawn after we were given consent: was it this one?
            _close_all(task.consents.pop(id(remote)).fds)

    def _ask(self, task: _Task, remote: RemoteRegion) -> _Consent:
        withdrawals = task.connection.withdrawals
        fds = self._agent.consent.ask_to_bind(task.connection, remote, task.deadline)
        consent = task.consents[id(remote)] = _Consent(withdrawals, fds)
        return consent

    def _link(self, task: _Task, backend: Backend) -> Link:
        """Return the backend's link with the peer, made now if there is none."""
        connection = task.connection
        with connection.lock:
            for link in connection.links:
                if link.backend == backend.name and link.lost is None:
                    return link
        if connection.record is None:
            connection.record = self._agent.consent.ask_for_record(connection, task.deadline)
        reason = backend.reaches(connection.record)
        if reason:
            raise BackendUnavailable(reason, peer=connection.name)
        link = backend.connect(connection.record, task.deadline)
        if not connection.add_link(link, is_silent=not backend.capabilities.messages):
            error = connection.lost or PeerLost(f"peer {connection.name!r} is lost", peer=connection.name)
            link.close(error)
            raise error.afresh()
        return link


def refusal(backend: Backend, remote: RemoteRegion, kinds: Kinds) -> str:
    """Return why a backend cannot carry these (local, remote) kinds to a region, or ''."""
    if not kinds <= backend.capabilities.kinds:
        return f"does not carry {kind_names(kinds)}"
    return "" if backend.name in remote.record.keys else f"{remote.owner!r} does not offer the region over it"


def kind_names(kinds: Kinds) -> str:
    """Return kinds as people write them: dram-vram."""
    return ", ".join(sorted(f"{ours.value}-{theirs.value}" for ours, theirs in kinds))


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
