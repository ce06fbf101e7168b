"""The weight transfer engine in a worker of vLLM: follows published weights, and loads a version between two steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pydantic import SecretBytes
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from raynixl.actors.gcs import GcsDirectory
from raynixl.agents import Agent
from raynixl.config import from_env
from raynixl.errors import ConfigError
from raynixl.integrations.needs import Landing, landing
from raynixl.integrations.vllm import worker_names
from raynixl.memory import MemoryKind
from raynixl.weights import Subscription, subscribe
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.recorder import Recording, record

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig

logger = logging.getLogger(__name__)


@dataclass
class RaynixlInitInfo(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not there for the type checker
    """What `raynixl.integrations.vllm.init_info` says."""

    name: str
    workers: str
    tensors: dict[str, tuple[str, list[int]]]
    gcs: str
    session: str
    job: str
    memory: str = "dram"


@dataclass
class RaynixlUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which version to load, and for how many seconds to wait until it is here."""

    version: int
    timeout: float = field(default=60.0)


class RaynixlEngine(WeightTransferEngine[RaynixlInitInfo, RaynixlUpdateInfo]):  # type: ignore[misc]
    """Loads versions of weights that land beside the model, pushed by `raynixl.WeightSync` while vLLM generates.

    What lands is the part of the checkpoint's tensors that this worker's own loader was seen to use when it ran once
    over tensors without memory. The loader then cuts, fuses and repacks it as this device's kernels need it.
    `update_weights` waits for a version and loads it whole, so that the other phases do nothing.
    """

    init_info_cls = RaynixlInitInfo
    update_info_cls = RaynixlUpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._agent: Agent | None = None
        self._subscription: Subscription | None = None
        self._landing: Landing | None = None

    def init_transfer_engine(self, init_info: RaynixlInitInfo) -> None:
        """Subscribe to the weights; another trainer's take the place of those followed before."""
        self.shutdown()
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        directory = GcsDirectory(init_info.session, init_info.job, address=init_info.gcs)
        config = from_env().model_copy(update={"secret": SecretBytes(directory.secret)})
        self._agent = Agent(worker_names(init_info.workers, rank + 1)[rank], config=config, directory=directory)
        infos = [TensorInfo(key, dtype, tuple(shape)) for key, (dtype, shape) in init_info.tensors.items()]
        device = "cpu" if init_info.memory == MemoryKind.DRAM.value else str(self.device)
        self._landing = landing(infos, self._record(infos), device=device)
        self._subscription = subscribe(
            self._agent, init_info.name, self._landing.tensors, shards=self._landing.shards, install="swap",
            memory=init_info.memory,
        )  # fmt: skip

    def _record(self, infos: Sequence[TensorInfo]) -> Recording | None:
        """Return what this worker's loader uses of a checkpoint's tensors; None if it does not say so."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        with set_current_vllm_config(self.vllm_config), disable_mtp_completeness_check(), _as_loaded(self.model):
            try:
                return record(self.model.load_weights, infos, self.model)
            except ConfigError as exc:
                logger.warning("this worker gets whole tensors, since its loader was not understood: %s", exc)
                return None

    def start_weight_update(self) -> None:
        """Nothing: `update_weights` loads a version whole."""

    def finish_weight_update(self) -> None:
        """Nothing: `update_weights` has loaded a version whole."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Wait for a version and load it."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.current_stream().synchronize()

    def receive_weights(self, update_info: RaynixlUpdateInfo) -> None:
        """Wait for a version, or a later one, and load it through vLLM's loader.

        Raises:
            ConfigError: `init_weight_transfer_engine` has not been called.
            TransferTimeout: the version did not come in time; the model stays as it is.
        """
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if self._subscription is None or self._landing is None:
            raise ConfigError("this worker follows no weights yet", hint="call init_weight_transfer_engine first")
        self._subscription.wait_version(update_info.version, update_info.timeout)
        with self._subscription.pinned(), disable_mtp_completeness_check():
            initialize_layerwise_reload(self.model)
            self.model.load_weights(self._landing.full())
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Follow no weights any more; the model keeps those that it has."""
        subscription, self._subscription = self._subscription, None
        agent, self._agent = self._agent, None
        if subscription is not None:
            subscription.close()
        if agent is not None:
            agent.close()
        self._landing = None


@contextmanager
def _as_loaded(model: torch.nn.Module) -> Iterator[None]:
    """Let a model have the parameters that its loader fills, without memory, in place of those that its kernels use."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta

    layers = [
        (layer, dict(layer._parameters), dict(layer._buffers), set(layer._non_persistent_buffers_set))
        for layer in model.modules()
    ]
    try:
        for layer, *_ in layers:
            restore_layer_on_meta(layer, get_layerwise_info(layer))
        yield
    finally:
        for layer, parameters, buffers, hidden in layers:
            layer._parameters, layer._buffers, layer._non_persistent_buffers_set = parameters, buffers, hidden
