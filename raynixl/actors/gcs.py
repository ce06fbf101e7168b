"""The GCS directory: agent records in Ray's own key-value store, under session and job."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from urllib.parse import quote

import ray

from raynixl.actors.store import Store
from raynixl.errors import BackendUnavailable, ConfigError, IntegrityError
from raynixl.host import host_identity
from raynixl.record import AgentRecord

logger = logging.getLogger(__name__)

DETACHED = "detached"
"""Value of the label `lifetime` of actors that outlive their job's driver."""
_SECRET_NBYTES = 32
_CLAIM_SECONDS = 10.0


class GcsDirectory:
    """Publishes and finds agent records of one job. Two jobs, and two clusters, never see each other.

    The store keeps no time and outlives jobs, so records carry a lease that their owner renews, and whoever finds
    the record of a dead agent removes it. While the store is down, `find` answers from what it has seen.
    """

    has_leases = True

    def __init__(self, session: str, job: str, *, address: str = "") -> None:
        self.job = job
        self._store = Store(address or _gcs_address())
        self._job_prefix = f"raynixl/{session}/{job}/"
        self._prefix = f"{self._job_prefix}agents/"
        self._host = host_identity()
        self._seen: dict[str, AgentRecord] = {}
        self.secret = self._job_secret()

    def publish(self, record: AgentRecord) -> None:
        """Publish or renew a record; a name passes on only from an agent that is dead.

        The secret goes when the job ends. Then only detached actors go on: the others are about to be killed.
        """
        key, data = self._key(record.name), record.to_bytes()
        if record.labels.get("lifetime") == DETACHED:
            self._store.put(self._secret_key, self.secret, overwrite=False)
        elif self._store.get(self._secret_key) is None:
            logger.debug("job %s is over: %r is not published any more", self.job, record.name)
            return
        if self._store.put(key, data, overwrite=False):
            return
        held = self._parse(key, self._store.get(key))
        if held is not None and held.incarnation != record.incarnation:
            if not self._may_replace(held, record) or not self._claim(key, held):
                raise _taken(held)
            self._store.put(key, data, overwrite=True)
            self._store.delete(self._claim_key(held))
        else:
            self._store.put(key, data, overwrite=True)

    def withdraw(self, name: str, incarnation: str) -> None:
        """Remove the record if it is still that incarnation's."""
        key = self._key(name)
        held = self._parse(key, self._store.get(key))
        if held is not None and held.incarnation == incarnation:
            self._store.delete(key)

    def find(self, name: str) -> AgentRecord | None:
        """Return the live record of a name: one request to the store. The record of a dead agent is removed."""
        key = self._key(name)
        try:
            record = self._parse(key, self._store.get(key))
        except BackendUnavailable:
            if name in self._seen:
                return self._seen[name]
            raise
        if record is None or not self._is_live(record):
            self._seen.pop(name, None)
            return None
        self._seen[name] = record
        return record

    def list(self) -> list[AgentRecord]:
        """Return all live records of the job; those of the dead are removed on the way."""
        return live_records(self._store, self._prefix)

    def close(self) -> None:
        """Nothing is held but a client, which ends with this object."""

    def end_job(self) -> None:
        """Remove what the job leaves in the store when its driver ends; detached actors' records stay."""
        kept = {self._key(one.name) for one in self.list() if one.labels.get("lifetime") == DETACHED}
        for key in self._store.keys(self._job_prefix):
            if key not in kept and not (kept and key == self._secret_key):
                self._store.delete(key)

    def sweep(self) -> None:
        """Remove what finished jobs of this session left in the store, such as those whose driver was killed."""
        session_prefix = self._job_prefix.rsplit("/", 2)[0] + "/"
        jobs = {key[len(session_prefix) :].split("/")[0] for key in self._store.keys(session_prefix)} - {self.job}
        for job in jobs - self._store.live_jobs() if jobs else ():
            if not live_records(self._store, f"{session_prefix}{job}/agents/"):
                self._store.delete_all(f"{session_prefix}{job}/")

    def _job_secret(self) -> bytes:
        """Return the secret that the agents of a job share; the first to ask makes it."""
        self._store.put(self._secret_key, secrets.token_bytes(_SECRET_NBYTES), overwrite=False)
        secret = self._store.get(self._secret_key)
        if secret is None or len(secret) != _SECRET_NBYTES:
            raise BackendUnavailable("the GCS has no secret for this job", hint="see whether the cluster is healthy")
        return secret

    def _is_live(self, record: AgentRecord) -> bool:
        if not _is_over(record, self._host):
            return True
        self.withdraw(record.name, record.incarnation)
        return False

    def _may_replace(self, held: AgentRecord, record: AgentRecord) -> bool:
        """Whether the holder of a name is known to be gone."""
        actor = held.labels.get("actor_id", "")
        restarted = bool(actor) and actor == record.labels.get("actor_id")
        return restarted or _is_over(held, self._host) or _is_dead_actor(actor)

    def _claim(self, key: str, held: AgentRecord) -> bool:
        """Become the only one who may put a record in the place of a dead one: the store has no compare-and-swap."""
        claim, now = self._claim_key(held), b"%d" % time.time()
        if not self._store.put(claim, now, overwrite=False):
            if _is_recent(self._store.get(claim)):
                return False
            self._store.put(claim, now, overwrite=True)  # who made it died on the way
        present = self._parse(key, self._store.get(key))
        if present is None or present.incarnation == held.incarnation:
            return True
        self._store.delete(claim)
        return False

    @property
    def _secret_key(self) -> str:
        return f"{self._job_prefix}secret"

    def _claim_key(self, held: AgentRecord) -> str:
        return f"{self._job_prefix}claims/{held.incarnation}"

    def _key(self, name: str) -> str:
        return self._prefix + quote(name, safe="")

    def _parse(self, key: str, data: bytes | None) -> AgentRecord | None:
        return None if data is None else _parse(key, data)


def live_records(store: Store, prefix: str) -> list[AgentRecord]:
    """Return the live records below a prefix, and remove those of the dead."""
    host, live = host_identity(), []
    for key, data in store.get_all(store.keys(prefix)).items():
        record = _parse(key, data)
        if record is None:
            continue
        if _is_over(record, host):
            _remove(store, key, record)
        else:
            live.append(record)
    return live


def session_records(session: str, address: str) -> list[AgentRecord]:
    """Return the live records of every job of a session, for people to look at."""
    store = Store(address)
    jobs = {key.split("/")[2] for key in store.keys(f"raynixl/{session}/")}
    return [record for job in sorted(jobs) for record in live_records(store, f"raynixl/{session}/{job}/agents/")]


def _remove(store: Store, key: str, record: AgentRecord) -> None:
    """Remove a dead agent's record unless another has taken its place."""
    data = store.get(key)
    held = None if data is None else _parse(key, data)
    if held is not None and held.incarnation == record.incarnation:
        store.delete(key)


def _parse(key: str, data: bytes) -> AgentRecord | None:
    """Return the record under a key, or None if it is none, or another agent's."""
    try:
        record = AgentRecord.from_bytes(data)
        if quote(record.name, safe="") != key.rsplit("/", 1)[1]:
            raise IntegrityError(f"it is the record of {record.name!r}", hint="remove the key")
    except IntegrityError as exc:
        logger.warning("ignored what lies under %r in the GCS: %s", key, exc)
        return None
    return record


def _is_over(record: AgentRecord, host: str) -> bool:
    """Whether the lease has ended, or the agent ran on this host and its socket, which ends with it, is gone."""
    if record.expires != 0.0 and record.expires < time.time():
        return True
    if record.host != host or "shm" not in record.backends or record.pid == os.getpid():
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


def _is_recent(claim: bytes | None) -> bool:
    return claim is not None and claim.isdigit() and time.time() - int(claim) < _CLAIM_SECONDS


def _is_dead_actor(actor_id: str) -> bool:
    """Whether Ray knows the actor to be dead."""
    if not actor_id:
        return False
    try:
        return actor_entry(actor_id).get("State") == "DEAD"
    except ray.exceptions.RayError as exc:
        logger.debug("Ray does not tell the state of actor %s: %s", actor_id, exc)
        return False


def actor_entry(actor_id: str) -> dict[str, object]:
    """Return what Ray's table of actors says of one; empty if nothing."""
    entry: dict[str, object] = ray._private.state.actors(actor_id)
    return entry


def _taken(held: AgentRecord) -> ConfigError:
    holder = f"process {held.pid} (actor {held.labels.get('actor_id', '-')})"
    return ConfigError(
        f"agent name {held.name!r} is taken by {holder}", hint="give the actor another name, or end the other one"
    )


def _gcs_address() -> str:
    if not ray.is_initialized():
        raise BackendUnavailable("Ray is not initialised here", hint="call ray.init() first")
    return str(ray.get_runtime_context().gcs_address)
