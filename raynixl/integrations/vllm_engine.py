"""The weight transfer engine in a worker of vLLM: follows published weights, and loads a version between two steps."""

from __future__ import annotations

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
from raynixl.integrations.vllm import worker_names
from raynixl.weights import Subscription, subscribe

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig


@dataclass
class RaynixlInitInfo(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not there for the type checker
    """What `raynixl.integrations.vllm.init_info` says."""

    name: str
    workers: str
    tensors: dict[str, tuple[str, list[int]]]
    tied: dict[str, str]
    gcs: str
    session: str
    job: str


@dataclass
class RaynixlUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which version to load, and for how many seconds to wait until it is here."""

    version: int
    timeout: float = field(default=60.0)


class RaynixlEngine(WeightTransferEngine[RaynixlInitInfo, RaynixlUpdateInfo]):  # type: ignore[misc]
    """Loads versions of weights that land beside the model, pushed by `raynixl.WeightSync` while vLLM generates.

    They land as tensors of the checkpoint; vLLM's own loader then cuts, fuses and repacks them for this worker, as
    its kernels need them. `update_weights` waits for a version and loads it whole, so that the other phases do nothing.
    """

    init_info_cls = RaynixlInitInfo
    update_info_cls = RaynixlUpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._agent: Agent | None = None
        self._subscription: Subscription | None = None
        self._landed: dict[str, torch.Tensor] = {}

    def init_transfer_engine(self, init_info: RaynixlInitInfo) -> None:
        """Subscribe to the weights; another trainer's take the place of those followed before."""
        self.shutdown()
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        directory = GcsDirectory(init_info.session, init_info.job, address=init_info.gcs)
        config = from_env().model_copy(update={"secret": SecretBytes(directory.secret)})
        self._agent = Agent(worker_names(init_info.workers, rank + 1)[rank], config=config, directory=directory)
        self._landed = {
            name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in init_info.tensors.items()
        }
        self._landed |= {name: self._landed[other] for name, other in init_info.tied.items()}
        self._subscription = subscribe(self._agent, init_info.name, self._landed, install="swap")

    def start_weight_update(self) -> None:
        """Nothing: `update_weights` loads a version whole."""

    def finish_weight_update(self) -> None:
        """Nothing: `update_weights` has loaded a version whole."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Wait for a version and load it."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: RaynixlUpdateInfo) -> None:
        """Wait for a version, or a later one, and load it through vLLM's loader.

        Raises:
            ConfigError: `init_weight_transfer_engine` has not been called.
            TransferTimeout: the version did not come in time; the model stays as it is.
        """
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if self._subscription is None:
            raise ConfigError("this worker follows no weights yet", hint="call init_weight_transfer_engine first")
        self._subscription.wait_version(update_info.version, update_info.timeout)
        with self._subscription.pinned(), disable_mtp_completeness_check():
            initialize_layerwise_reload(self.model)
            self.model.load_weights(self._landed.items())
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Follow no weights any more; the model keeps those that it has."""
        subscription, self._subscription = self._subscription, None
        agent, self._agent = self._agent, None
        if subscription is not None:
            subscription.close()
        if agent is not None:
            agent.close()
        self._landed = {}
