"""The GCS directory: agent records in Ray's own key-value store, under session and job."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from urllib.parse import quote

import ray
from ray.experimental import internal_kv

from raynixl.errors import BackendUnavailable, ConfigError, IntegrityError
from raynixl.host import host_identity
from raynixl.record import AgentRecord

logger = logging.getLogger(__name__)

_NAMESPACE = b"raynixl"
_SECRET_NBYTES = 32


class GcsDirectory:
    """Publishes and finds agent records of one job. Two jobs, and two clusters, never see each other.

    The store keeps no time and outlives jobs, so records carry a lease that their owner renews, and whoever finds
    the record of a dead agent removes it.
    """

    has_leases = True

    def __init__(self, session: str, job: str) -> None:
        self.job = job
        self.secret = _job_secret(session, job)
        self._secret_key = _secret_key(session, job)
        self._host = host_identity()
        self._prefix = f"raynixl/{session}/{job}/agents/"

    def publish(self, record: AgentRecord) -> None:
        """Publish or renew a record; a name passes on only from an agent that is dead."""
        key, data = self._key(record.name), record.to_bytes()
        _put(self._secret_key, self.secret, overwrite=False)  # a detached actor outlives its job's driver
        if _put(key, data, overwrite=False):
            return
        held = self._parse(_get(key))
        if held is not None and held.incarnation != record.incarnation and not self._may_replace(held, record):
            raise ConfigError(
                f"agent name {record.name!r} is taken by process {held.pid} (actor {held.labels.get('actor_id', '-')})",
                hint="give the actor another name, or end the other one",
            )
        _put(key, data, overwrite=True)

    def withdraw(self, name: str, incarnation: str) -> None:
        """Remove the record if it is still that incarnation's."""
        held = self._parse(_get(self._key(name)))
        if held is not None and held.incarnation == incarnation:
            _delete(self._key(name))

    def find(self, name: str) -> AgentRecord | None:
        """Return the live record of a name: one request to the store."""
        record = self._parse(_get(self._key(name)))
        return record if record is not None and not _has_expired(record) else None

    def list(self) -> list[AgentRecord]:
        """Return all live records of the job; those of the dead of this host are removed on the way."""
        return [record for record in self._all() if self._is_live(record)]

    def close(self) -> None:
        """Nothing is held."""

    def end_job(self) -> None:
        """Remove what the job leaves in the store when its driver ends.

        Detached actors outlive it, and publish themselves again with their next renewal.
        """
        for key in _list(self._prefix):
            _delete(key)
        _delete(self._secret_key)

    def _all(self) -> Sequence[AgentRecord]:
        records = [self._parse(_get(key)) for key in _list(self._prefix)]
        return [record for record in records if record is not None]

    def _is_live(self, record: AgentRecord) -> bool:
        if _has_expired(record) or self._is_dead_here(record):
            self.withdraw(record.name, record.incarnation)
            return False
        return True

    def _may_replace(self, held: AgentRecord, record: AgentRecord) -> bool:
        """Whether the holder of a name is known to be gone."""
        actor = held.labels.get("actor_id", "")
        restarted = bool(actor) and actor == record.labels.get("actor_id")
        return restarted or _has_expired(held) or self._is_dead_here(held) or _is_dead_actor(actor)

    def _is_dead_here(self, record: AgentRecord) -> bool:
        """Whether the agent ran on this host and its socket, which ends with its process, is gone."""
        if record.host != self._host or "shm" not in record.backends or record.pid == os.getpid():
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.setblocking(False)
            try:
                probe.connect(f"\0raynixl/{record.incarnation}")
            except ConnectionRefusedError:
                return True
            except OSError:
                return False
        return False

    def _key(self, name: str) -> bytes:
        return (self._prefix + quote(name, safe="")).encode()

    def _parse(self, data: bytes | None) -> AgentRecord | None:
        if data is None:
            return None
        try:
            return AgentRecord.from_bytes(data)
        except IntegrityError as exc:
            logger.warning("ignored a record in the GCS: %s", exc)
            return None


def _job_secret(session: str, job: str) -> bytes:
    """Return the secret that the agents of a job share; the first to ask makes it."""
    key = _secret_key(session, job)
    _put(key, secrets.token_bytes(_SECRET_NBYTES), overwrite=False)
    secret = _get(key)
    if secret is None or len(secret) != _SECRET_NBYTES:
        raise BackendUnavailable("the GCS has no secret for this job", hint="see whether the cluster is healthy")
    return secret


def all_records(session: str) -> list[AgentRecord]:
    """Return the live records of every job of a session, for people to look at."""
    jobs = {key.decode().split("/")[2] for key in _list(f"raynixl/{session}/")}
    return [record for job in sorted(jobs) for record in GcsDirectory(session, job).list()]


def _secret_key(session: str, job: str) -> bytes:
    return f"raynixl/{session}/{job}/secret".encode()


def _has_expired(record: AgentRecord) -> bool:
    return record.expires != 0.0 and record.expires < time.time()


def _is_dead_actor(actor_id: str) -> bool:
    """Whether Ray knows the actor to be dead."""
    if not actor_id:
        return False
    with contextlib.suppress(Exception):
        entry = ray._private.state.actors(actor_id)
        return bool(entry) and entry.get("State") == "DEAD"
    return False


def _put(key: bytes, value: bytes, *, overwrite: bool) -> bool:
    """Store a value; return whether it was stored (False: there is one already)."""
    with _translated():
        return not internal_kv._internal_kv_put(key, value, overwrite=overwrite, namespace=_NAMESPACE) or overwrite


def _get(key: bytes) -> bytes | None:
    with _translated():
        value: bytes | None = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    return value


def _delete(key: bytes) -> None:
    with _translated():
        internal_kv._internal_kv_del(key, namespace=_NAMESPACE)


def _list(prefix: str) -> list[bytes]:
    with _translated():
        keys: list[bytes] = internal_kv._internal_kv_list(prefix.encode(), namespace=_NAMESPACE)
    return keys


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn Ray's errors about the store into ours."""
    try:
        if not ray.is_initialized():
            raise BackendUnavailable("Ray is not initialised here", hint="call ray.init() first")
        yield
    except (ray.exceptions.RayError, RuntimeError, ValueError, TimeoutError, AssertionError) as exc:
        raise BackendUnavailable(f"the GCS does not answer: {exc}", hint="see whether the cluster is healthy") from exc
