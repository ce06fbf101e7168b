"""Ranks of the weights benchmark in Ray actors, and the ways that Ray itself has: its object store, and RDT."""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
import warnings
from contextlib import ExitStack
from typing import Any

import ray

from raynixl.bench.nixl import find_nixl
from raynixl.bench.target import Fields
from raynixl.bench.weights_rank import Rank
from raynixl.errors import BackendUnavailable, RaynixlError

ACTOR_SECONDS = 180.0
_RDT = "nixl"


class ActorRank(Rank):
    """A rank in a Ray actor, with the steps that only an actor can do."""

    def give(self) -> list[Any]:
        """Return the parameters as arrays, which Ray copies into its store once."""
        return [flat.numpy() for flat in self.flat_tensors()]

    def take(self, arrays: list[Any]) -> Fields:
        """Copy the store's arrays into the parameters."""
        import torch

        began = time.monotonic()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            for tensor, array in zip(self.tensors, arrays, strict=True):
                tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(array))
        at = time.monotonic()
        return {"at": at, "flip_ms": (at - began) * 1e3}

    def register(self) -> None:
        """Register all parameters with NIXL, instead of those that were registered before."""
        from ray.experimental import deregister_nixl_memory, register_nixl_memory

        _alias_nixl()
        old, self._registered = getattr(self, "_registered", []), self.tensors
        for tensor in old:
            deregister_nixl_memory(tensor)
        for tensor in self._registered:
            register_nixl_memory(tensor)

    def give_direct(self) -> list[Any]:
        """Return a reference to the registered parameters, in a list so that Ray hands on the reference itself."""
        return [ray.put(self._registered, _tensor_transport=_RDT)]

    def take_direct(self, boxed: list[Any]) -> Fields:
        """Read the source's parameters into the registered ones here."""
        from ray.experimental import set_target_for_ref

        began = time.monotonic()
        set_target_for_ref(boxed[0], self._registered)
        ray.get(boxed[0])
        at = time.monotonic()
        return {"at": at, "flip_ms": (at - began) * 1e3}


def _alias_nixl() -> None:
    """Let Ray find NIXL under the name that it imports, as the package `nixl` does; the wheels install `nixl_cu13`."""
    if "nixl" not in sys.modules and importlib.util.find_spec("nixl") is None:
        sys.modules["nixl"] = importlib.import_module(find_nixl())
        sys.modules["nixl._api"] = importlib.import_module(f"{find_nixl()}._api")


class RayCrew:
    """Ray actors on a cluster of this process's own."""

    def __init__(self, stack: ExitStack, world: int, store_nbytes: int) -> None:
        self.world = world
        ray.init(
            address="local", num_cpus=world, include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR, object_store_memory=store_nbytes,
        )  # fmt: skip
        stack.callback(ray.shutdown)
        options: dict[str, Any] = {"num_cpus": 1, "enable_tensor_transport": True}
        kind: Any = ray.remote(**options)(ActorRank)
        self.actors: list[Any] = [kind.remote() for _ in range(world)]
        stack.callback(self._close)
        wait_for([actor.__ray_ready__.remote() for actor in self.actors])

    def each(self, do: str, fields: list[Fields]) -> list[Fields]:
        """Have every rank do one thing at the same time, each with fields of its own."""
        return wait_for([actor.ask.remote(do, **own) for actor, own in zip(self.actors, fields, strict=True)])

    def some(self, do: str, ranks: range, **fields: Any) -> list[Fields]:
        """Have some ranks do one thing at the same time."""
        return wait_for([self.actors[rank].ask.remote(do, **fields) for rank in ranks])

    def _close(self) -> None:
        wait_for([actor.close.remote() for actor in self.actors])


def wait_for(refs: list[Any]) -> list[Any]:
    """Return what actors answer, a bounded time; raise their errors of ours as they were."""
    try:
        answers: list[Any] = ray.get(refs, timeout=ACTOR_SECONDS)
    except ray.exceptions.RayTaskError as exc:
        if isinstance(exc.cause, RaynixlError):
            raise exc.cause from exc
        raise
    return answers


class StoreWay:
    """Ray's object store: the source puts its parameters as arrays, each receiver copies them into its own."""

    impl = "ray"

    def __init__(self, crew: RayCrew, nbytes: int) -> None:
        self._crew, self._nbytes = crew, nbytes

    def prepare(self) -> None:
        """Nothing to do."""

    def run(self) -> list[Fields]:
        """Carry the weights once."""
        made = self._crew.actors[0].give.remote()
        return wait_for([actor.take.remote(made) for actor in self._crew.actors[1:]])

    def egress_nbytes(self) -> int:
        """The source writes its bytes once, into shared memory."""
        return self._nbytes


class DirectWay:
    """Ray Direct Transport over NIXL, from and into memory that is registered beforehand: every receiver reads."""

    impl = "rdt"

    def __init__(self, crew: RayCrew, nbytes: int) -> None:
        self._crew, self._nbytes = crew, nbytes
        try:
            self.prepare()
            self.run()
        except (ray.exceptions.RayError, ImportError, ValueError) as exc:
            why = str(exc).strip().splitlines()[-1]
            raise BackendUnavailable(f"Ray Direct Transport over NIXL does not run here: {why}") from exc

    def prepare(self) -> None:
        """Register the parameters: a version that was flipped by repointing lies elsewhere than the last."""
        wait_for([actor.register.remote() for actor in self._crew.actors])

    def run(self) -> list[Fields]:
        """Carry the weights once."""
        made = self._crew.actors[0].give_direct.remote()
        return wait_for([actor.take_direct.remote(made) for actor in self._crew.actors[1:]])

    def egress_nbytes(self) -> int:
        """Every receiver reads all from the source."""
        return self._nbytes * (self._crew.world - 1)
