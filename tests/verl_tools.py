"""Workers of verl for its test; workers of Ray import this file too."""

from __future__ import annotations

from typing import Any

import torch
from verl.checkpoint_engine import CheckpointEngineRegistry, CheckpointEngineWorker
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.config import CheckpointEngineConfig

MODULE = "raynixl.integrations.verl"
CONFIG = CheckpointEngineConfig(
    backend="raynixl", custom_backend_module=MODULE, engine_kwargs={"raynixl": {"timeout": 30.0}}
)


def make_model(seed: int) -> torch.nn.Module:
    """A small model with values of its own."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 10).to(torch.bfloat16)]
    return torch.nn.Sequential(*layers)


class Trainer(Worker):
    """A trainer's rank as verl has them, without the training."""

    def __init__(self) -> None:
        super().__init__()
        from verl.utils.import_utils import import_external_libs

        import_external_libs(MODULE)
        options = CONFIG.engine_kwargs["raynixl"]
        self.checkpoint_engine = CheckpointEngineRegistry.new(
            "raynixl", is_master=self.rank == 0, bucket_size=1 << 20, **options
        )
        self.model = make_model(0)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def train(self, seed: int) -> None:
        """Change all weights."""
        self.model = make_model(seed)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps: int | None = None, mode: str = "auto") -> Any:
        """Send the weights, tensor by tensor, as verl does."""
        return await self.checkpoint_engine.send_weights(
            ((name, one) for name, one in self.model.state_dict().items()), global_steps=global_steps
        )

    @register(dispatch_mode=Dispatch.DP_COMPUTE, blocking=False)
    def execute_checkpoint_engine(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run a method of the engine."""
        return getattr(self.checkpoint_engine, method)(*args, **kwargs)


class Server:
    """Stands for the inference engine: a model that weights are loaded into."""

    replica_rank, is_leader_rank = 0, True

    def __init__(self) -> None:
        self.model = make_model(99)
        self.steps: list[int | None] = []

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        """Load the tensors as they come."""
        state = {name: tensor.clone() async for name, tensor in weights}
        self.model.load_state_dict(state)
        self.steps.append(global_steps)


class Rollout(CheckpointEngineWorker):
    """verl's own worker beside an inference engine."""

    def __init__(self, rollout_config: Any) -> None:
        super().__init__(rollout_config, None, Server())

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def look(self) -> Any:
        """Return what the engine has."""
        return self.server_adapter.model.state_dict(), self.server_adapter.steps


class Replica:
    """A rollout replica as verl's manager sees it."""

    def __init__(self, workers: list[Any]) -> None:
        self.workers = workers
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        async def call(**_: Any) -> None:
            self.calls.append(name)

        return call
