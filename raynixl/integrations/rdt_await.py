"""Await: what Ray 2.60 lacks so that `await ref` brings an object of Ray Direct Transport.

There, `ray.get` fetches such an object, and an argument is sent to its actor; `await` only waits for bytes that nobody
has asked for, until it times out. And it does so on the thread that brings replies, where nothing may wait.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import ray
from ray import _raylet
from ray._private.worker import Worker

_MARK = "_raynixl_awaited"


@dataclass(frozen=True, slots=True)
class _Unfetched:
    """Stands for the value of an awaited reference, which is still to be fetched."""

    ref: Any


def fetch_for_await(name: str) -> None:
    """Have `await` fetch objects of the transport of this name, in this process. Idempotent."""
    names: set[str] | None = getattr(Worker, _MARK, None)
    if names is not None:
        names.add(name)
        return
    names = {name}
    deserialize: Any = Worker.deserialize_objects
    settle: Any = _raylet._set_future_helper

    def deserialize_objects(self: Any, values: Any, refs: Any, rdt_objects: Any = None) -> Any:
        """Leave what `await` has to fetch for later."""
        if rdt_objects is None and len(refs) == 1 and _is_unfetched(self, refs[0], names) and _is_awaited(self):
            return [_Unfetched(refs[0])]
        return deserialize(self, values, refs, rdt_objects)

    def set_future(result: Any, *, py_future: Any) -> None:
        """Fetch on a thread what was left for later."""
        if isinstance(result, _Unfetched):
            fetching = threading.Thread(
                target=_fetch, args=(result.ref, py_future), name="raynixl-rdt-await", daemon=True
            )
            fetching.start()
        else:
            settle(result, py_future=py_future)

    setattr(Worker, _MARK, names)
    Worker.deserialize_objects = deserialize_objects  # type: ignore  # Ray declares it as a method of its own
    _raylet._set_future_helper = set_future


def _is_unfetched(worker: Any, ref: Any, names: set[str]) -> bool:
    """Whether an object is of our transport, this process has a reference to it, and no copy."""
    manager = worker.rdt_manager
    meta = manager.get_rdt_metadata(ref.hex())
    if meta is None or meta.tensor_transport_backend not in names:
        return False
    return not manager.rdt_store.has_object(ref.hex())


def _is_awaited(worker: Any) -> bool:
    """Whether this thread runs no task: arguments are unpacked where their task runs, whose id ends as its actor's."""
    actor = ray.get_runtime_context().get_actor_id()
    return actor is None or not worker.core_worker.get_current_task_id().hex().endswith(actor)


def _fetch(ref: Any, future: Any) -> None:
    try:
        value = ray.get(ref)
    except Exception as exc:  # noqa: BLE001 - handed to the one who awaits
        if not future.done():
            future.set_exception(exc)
    else:
        if not future.done():
            future.set_result(value)
