"""verl: the checkpoint engine "raynixl", which brings the trainer's weights to all rollout workers.

In verl's configuration: rollout.checkpoint_engine.backend=raynixl and
rollout.checkpoint_engine.custom_backend_module=raynixl.integrations.verl.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raynixl.actors import agent as this_agent
from raynixl.conditions import Condition
from raynixl.errors import BackendUnavailable, ConfigError, IntegrityError, TransferTimeout
from raynixl.memory import MemoryKind
from raynixl.weights import Publication, Subscription, WeightSync, publish, subscribe

if TYPE_CHECKING:
    import torch

try:
    from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
    from verl.workers.rollout.utils import ensure_async_iterator
except ImportError as exc:
    raise BackendUnavailable(f"verl's checkpoint engines are not here: {exc}", hint="pip install 'verl>=0.9'") from exc

logger = logging.getLogger(__name__)
NAME, EXPECT = "verl", "raynixl/verl/expect"
_LOOK_SECONDS = 0.5  # how often a rollout that waits looks whether its source is still there
Shapes = tuple[tuple[str, str, tuple[int, ...]], ...]


@CheckpointEngineRegistry.register("raynixl")
class RaynixlCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """One for each worker of verl, made by verl. Memory and connections are kept from one update to the next.

    The trainers' first rank copies the full tensors that verl makes aside and pushes them as a version; rollout
    workers feed each other. Options in `engine_kwargs`: `timeout` of an update in seconds, `device` that rollouts get
    the tensors on (by default a GPU if there is one), `memory` in which the tensors lie on both sides ('dram', the
    hosts' by default, or 'vram', that of GPUs with room for three copies), and those of `WeightSync` as `sync`.
    """

    def __init__(
        self,
        bucket_size: int = 0,
        is_master: bool = False,
        timeout: float = 300.0,
        device: str = "",
        memory: str = MemoryKind.DRAM.value,
        sync: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.is_master = is_master
        self._timeout = timeout
        self._device = device
        self._memory = memory
        self._options = dict(sync or {})
        self._source = ""
        self._targets: tuple[str, ...] = ()
        self._sender: _Sender | None = None
        self._receiver: _Receiver | None = None

    def prepare(self) -> dict[str, Any]:
        """Start this process's agent; answer with its name, by which the others find it."""
        return {"agent": this_agent().name}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Tell everybody who sends and who receives."""
        names = [one["agent"] for one in metadata]
        both = {"source": names[0], "targets": tuple(names[actor_wg_world_size:])}
        return tuple(  # type: ignore[return-value]
            {"rank": list(range(size)), **{key: [value] * size for key, value in both.items()}}
            for size in (actor_wg_world_size, rollout_world_size)
        )

    def init_process_group(self, rank: int, source: str, targets: Sequence[str]) -> None:
        """Learn who sends and who receives; a receiver waits for word from the source."""
        self._source, self._targets = source, tuple(targets)
        if this_agent().name in self._targets and self._receiver is None:
            self._receiver = _Receiver(self._timeout, self._memory, self._device or _default_device())

    def finalize(self) -> None:
        """Keep memory and connections for the next update."""

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        for end in (self._sender, self._receiver):
            if end is not None:
                end.close()
        self._sender = self._receiver = None

    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, float]:
        """Push the tensors of a generator to all rollout workers; ranks but the first only help to make them.

        Raises:
            PeerLost, TransferTimeout: of the first rollout worker that did not take them.
        """
        if this_agent().name != self._source:
            async for _ in ensure_async_iterator(weights):
                pass
            return {}
        if self._sender is None:
            self._sender = _Sender(self._memory)
        await self._sender.collect(weights)
        report = await asyncio.to_thread(self._sender.push, self._targets, self._timeout, self._options)
        logger.info("step %s: %s", global_steps, report)
        return {"raynixl/seconds": report.seconds, "raynixl/gbps": report.gbps}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Yield the tensors of the next version, which is complete and verified when the first one comes.

        Raises:
            PeerLost: the source is gone.
            TransferTimeout: no version came in time.
        """
        receiver = self._receiver
        if receiver is None:
            raise ConfigError("this worker is no target of the update", hint="call init_process_group first")
        subscription = await asyncio.to_thread(receiver.wait, self._source)
        device = self._device or _default_device()
        with subscription.pinned():
            for name, tensor in receiver.tensors.items():
                yield name, tensor.to(device)


class _Sender:
    """The trainer's end: copies of full tensors, published."""

    def __init__(self, memory: str) -> None:
        self._memory = memory
        self._tensors: dict[str, torch.Tensor] = {}
        self._publication: Publication | None = None
        self._shapes: Shapes = ()
        self._sync: tuple[tuple[str, ...], WeightSync] | None = None
        self._version = 0

    async def collect(self, weights: Any) -> None:
        """Copy the tensors of a generator, into the memory of the last ones if they are alike."""
        fresh: dict[str, torch.Tensor] = {}
        async for name, tensor in ensure_async_iterator(weights):
            known = self._tensors.get(name)
            if known is None or known.shape != tensor.shape or known.dtype != tensor.dtype:
                device = "cpu" if self._memory == MemoryKind.DRAM.value else tensor.device
                known = tensor.detach().to(device, copy=True).contiguous()
            else:
                known.copy_(tensor.detach())
            fresh[name] = known
        shapes = tuple((name, str(one.dtype).removeprefix("torch."), tuple(one.shape)) for name, one in fresh.items())
        if shapes == self._shapes and self._publication is not None:
            with self._publication.updating():
                pass  # the copies may still be on this thread's stream of a GPU, which need not be that of before
        else:
            self.close()
            self._tensors, self._shapes = fresh, shapes
            self._publication = publish(this_agent(), NAME, fresh, memory=self._memory)

    def push(self, targets: tuple[str, ...], timeout: float, options: Mapping[str, Any]) -> Any:
        """Push them as the version after the latest that a target has; raise what any target failed with."""
        agent, deadline = this_agent(), time.monotonic() + timeout
        expected = json.dumps(self._shapes).encode()
        replies = [agent.ask(target, EXPECT, expected, timeout=timeout) for target in targets]
        versions = [int(reply.wait(max(0.001, deadline - time.monotonic()))) for reply in replies]
        if self._sync is None or self._sync[0] != targets:
            self._sync = (targets, WeightSync(agent, NAME, [agent.name], list(targets), timeout=timeout, **options))
        sync = self._sync[1]
        self._version = max([self._version, *versions]) + 1  # those of before a restart count, too
        report = sync.push(self._version, timeout=max(0.001, deadline - time.monotonic()))
        report.raise_for_excluded()
        return report

    def close(self) -> None:
        """Publish no more."""
        if self._publication is not None:
            self._publication.close()
        self._publication, self._sync, self._shapes = None, None, ()


class _Receiver:
    """A rollout worker's end: tensors that follow the source's."""

    def __init__(self, timeout: float, memory: str, device: str) -> None:
        self._memory = memory
        self._device = "cpu" if memory == MemoryKind.DRAM.value else device
        self.tensors: dict[str, torch.Tensor] = {}
        self._timeout = timeout
        self._agent = this_agent()
        self._changed = Condition()  # protects all below
        self._shapes: Shapes = ()
        self._subscription: Subscription | None = None
        self._taken = 0
        self._agent.serve(EXPECT, self._on_expect, threaded=True)

    def wait(self, source: str) -> Subscription:
        """Wait for a version that was not taken yet; return the subscription that has it."""
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            with self._changed:
                self._changed.wait_for(lambda: self._subscription is not None, _LOOK_SECONDS)
                subscription = self._subscription
            if subscription is not None and self._has_come(subscription):
                return subscription
            lost = self._agent.lost(source)
            if lost is not None:
                raise lost
        raise TransferTimeout(f"no weights came within {self._timeout:g} s", hint="see what the trainer does")

    def close(self) -> None:
        """Follow the source no more."""
        self._agent.control.unserve(EXPECT)
        with self._changed:
            if self._subscription is not None:
                self._subscription.close()
            self._subscription = None

    def _has_come(self, subscription: Subscription) -> bool:
        try:
            self._taken = subscription.wait_version(self._taken + 1, _LOOK_SECONDS)
        except TransferTimeout:
            return False
        return True

    def _on_expect(self, _peer: str, payload: bytes) -> bytes:
        """Make room for the tensors that are about to come; answer with the version that is here."""
        shapes = _parse(payload)
        with self._changed:
            if self._subscription is None or shapes != self._shapes:
                if self._subscription is not None:
                    self._subscription.close()
                self.tensors, self._shapes, self._taken = _empty(shapes, self._device), shapes, 0
                self._subscription = subscribe(self._agent, NAME, self.tensors, memory=self._memory)
                self._changed.notify_all()
            return str(self._subscription.version).encode()


def _parse(payload: bytes) -> Shapes:
    try:
        return tuple((str(name), str(dtype), tuple(map(int, shape))) for name, dtype, shape in json.loads(payload))
    except (ValueError, TypeError) as exc:
        raise IntegrityError("the list of tensors is malformed", hint="run one version of raynixl") from exc


def _empty(shapes: Shapes, device: str) -> dict[str, torch.Tensor]:
    import torch

    kinds = {name: getattr(torch, dtype, None) for name, dtype, _ in shapes}
    if not all(isinstance(kind, torch.dtype) for kind in kinds.values()):
        raise IntegrityError("the list of tensors names unknown dtypes", hint="run one version of torch")
    return {name: torch.zeros(shape, dtype=kinds[name], device=device) for name, _, shape in shapes}


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
