"""The store: Ray's GCS key-value store, through a client of our own whose every call ends by a deadline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

from raynixl.errors import BackendUnavailable

STORE_TIMEOUT = 5.0
_NAMESPACE = b"raynixl"
_BATCH = 500  # keys asked for at once: a record may have 60 kB, a reply of the GCS 512 MiB


class Store:
    """Keys and values of a cluster. Ray's own client waits for ever, and is gone when `ray.shutdown()` has begun."""

    def __init__(self, address: str, *, timeout: float = STORE_TIMEOUT) -> None:
        self._timeout = timeout
        with self._translated():
            self._client: Any = GcsClient(address=address)

    def put(self, key: str, value: bytes, *, overwrite: bool) -> bool:
        """Store a value; return whether it was stored (False: there is one already)."""
        with self._translated():
            added = self._client.internal_kv_put(key.encode(), value, overwrite, _NAMESPACE, timeout=self._timeout)
        return bool(added) or overwrite

    def get(self, key: str) -> bytes | None:
        """Return a value, or None."""
        with self._translated():
            value: bytes | None = self._client.internal_kv_get(key.encode(), _NAMESPACE, timeout=self._timeout)
        return value

    def get_all(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the values of those keys that there are."""
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), _BATCH):
            batch = [key.encode() for key in keys[start : start + _BATCH]]
            with self._translated():
                values = self._client.internal_kv_multi_get(batch, namespace=_NAMESPACE, timeout=self._timeout)
            found |= {key.decode(): value for key, value in values.items()}
        return found

    def keys(self, prefix: str) -> list[str]:
        """Return the keys that begin like this; one that is no text is not ours."""
        with self._translated():
            raw: list[bytes] = self._client.internal_kv_keys(prefix.encode(), _NAMESPACE, timeout=self._timeout)
        return [text for key in raw if "\ufffd" not in (text := key.decode(errors="replace"))]

    def delete(self, key: str) -> None:
        """Remove a key, if there is such."""
        with self._translated():
            self._client.internal_kv_del(key.encode(), False, _NAMESPACE, timeout=self._timeout)

    def delete_all(self, prefix: str) -> None:
        """Remove every key that begins like this."""
        with self._translated():
            self._client.internal_kv_del(prefix.encode(), True, _NAMESPACE, timeout=self._timeout)

    def live_jobs(self) -> set[str]:
        """Return the ids of the jobs whose drivers run."""
        with self._translated():
            jobs = self._client.get_all_job_info(
                skip_submission_job_info_field=True, skip_is_running_tasks_field=True, timeout=self._timeout
            )
        return {job.hex() for job, entry in jobs.items() if not entry.is_dead}

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn Ray's errors about the store into ours."""
        try:
            yield
        except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as exc:
            raise BackendUnavailable(
                f"the GCS does not answer: {exc}", hint="see whether the cluster is healthy"
            ) from exc
