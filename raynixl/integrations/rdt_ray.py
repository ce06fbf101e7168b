"""Ray's side of Ray Direct Transport: its classes wherever they live in this Ray, and what it lacks for ours."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import ray

from raynixl.errors import BackendUnavailable
from raynixl.integrations.rdt_await import fetch_for_await

_HOMES = ("ray.experimental.rdt", "ray.experimental.gpu_object_manager")


def _find(name: str) -> Any:
    """Return a name of Ray Direct Transport: its modules have moved twice.

    Raises:
        BackendUnavailable: this Ray has no such thing.
    """
    for home in _HOMES:
        for module in (home, f"{home}.tensor_transport_manager", f"{home}.util"):
            found = getattr(_import(module), name, None)
            if found is not None:
                return found
    raise BackendUnavailable(
        f"Ray {ray.__version__} has no {name}", hint="custom tensor transports came with Ray 2.53; 2.60 is tested"
    )


def _import(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        return None


TensorTransportManager: Any = _find("TensorTransportManager")
TensorTransportMetadata: Any = _find("TensorTransportMetadata")
CommunicatorMetadata: Any = _find("CommunicatorMetadata")
FetchRequest: Any = _find("FetchRequest")


def register_once(name: str, devices: list[str], manager: type[Any]) -> None:
    """Tell Ray of a transport in this process, unless it knows it already."""
    import torch

    known: dict[str, Any] = _find("transport_manager_info")
    if name.upper() not in known:
        _find("_ensure_default_transports_registered")()  # else Ray takes ours for the first of its own
        _find("register_tensor_transport")(name, devices, manager, torch.Tensor)
    fetch_for_await(name.upper())


def metadata_of(ref: Any, timeout: float) -> Any:
    """Return the transport's metadata of a reference's object, which may be still in the making.

    Raises:
        ValueError: it is no object of a tensor transport.
        TimeoutError: it was not made in time.
    """
    manager = _manager()
    if not manager.is_managed_object(ref.hex()):
        raise ValueError(f"{ref} is no object of a tensor transport")
    meta = manager.wait_for_tensor_transport_metadata(ref.hex(), timeout)
    if meta is None:
        raise TimeoutError(f"{ref} was not made within {timeout:g} s")
    return meta


def is_borrowed(object_id: str) -> bool:
    """Whether this process has a reference to an object that another one owns: what comes as an argument has none."""
    if not _manager().is_managed_object(object_id):
        return False
    worker: Any = ray._private.worker.global_worker
    ref: Any = ray.ObjectRef(bytes.fromhex(object_id))
    owner: bytes = worker.core_worker.get_owner_address(ref)
    return bytes.fromhex(ray.get_runtime_context().get_worker_id()) not in owner


def forget_borrowed(object_ids: Iterable[str]) -> set[str]:
    """Drop Ray's metadata of borrowed objects that this process has no reference to any more; return the others.

    Ray 2.60 keeps them for ever (its issue 57962).
    """
    worker: Any = ray._private.worker.global_worker
    manager = _manager()
    alive = {key.decode() for key in worker.core_worker.get_all_reference_counts()}
    kept = set(object_ids)
    for object_id in kept - alive:
        with manager._lock:
            manager._managed_rdt_metadata.pop(object_id, None)
    return kept & alive


def _manager() -> Any:
    return ray._private.worker.global_worker.rdt_manager


def manager_of(name: str) -> Any:
    """Return the one object in this process that Ray made of a registered transport."""
    return _find("get_tensor_transport_manager")(name.upper())
