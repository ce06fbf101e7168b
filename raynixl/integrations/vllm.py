"""vLLM, from the trainer's side: what workers are told so that they follow weights that are published under a name.

vLLM's workers find the backend "raynixl" through the entry point `vllm.general_plugins`, which calls `register`:

    llm = LLM(model, weight_transfer_config=WeightTransferConfig(backend="raynixl"))
    rx.publish("policy", model)
    llm.init_weight_transfer_engine({"init_info": init_info("policy", model)})
    sync = rx.WeightSync("policy", ["driver"], [worker_names("policy", 2)])  # two workers, which flip together
    for version in ...:
        sync.push(version).raise_for_excluded()  # arrives while the engine generates
        llm.start_weight_update()
        llm.update_weights({"update_info": {"version": version}})
        llm.finish_weight_update()

Nothing here needs vLLM to be installed where the trainer runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raynixl.weights.tensors import Model

BACKEND = "raynixl"


def register() -> None:
    """Make the backend known to vLLM in this process; vLLM calls it, in some processes more than once."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "raynixl.integrations.vllm_engine", "RaynixlEngine")


def init_info(name: str, model: Model, *, workers: str = "", memory: str = "dram") -> dict[str, Any]:
    """Return what to give to `init_weight_transfer_engine`: plain values, fit for JSON.

    The tensors of `model`, a module or state dict (on the meta device, too), must be named as in a checkpoint of what
    vLLM serves, and be of the dtypes in which they are published. `workers` is what the names of the workers' agents
    begin with, by default the name of the weights. `memory` is where versions land: 'dram', the workers' host memory,
    or 'vram', their GPUs, which then need room for two more copies of what they hold.

    Raises:
        ConfigError: Ray is not initialised, through which workers and trainers find each other.
    """
    from raynixl.actors.process import here
    from raynixl.weights.tensors import dtype_name, named_tensors

    place = here()
    tensors = {key: (dtype_name(tensor), list(tensor.shape)) for key, tensor in named_tensors(model).items()}
    return {
        "name": name, "workers": workers or name, "tensors": tensors,
        "memory": memory, "gcs": place.gcs, "session": place.session, "job": place.job,
    }  # fmt: skip


def worker_names(workers: str, count: int) -> list[str]:
    """Return the names of the agents of vLLM's workers, data-parallel ones included, in order of rank."""
    return [f"{workers}-vllm-{rank}" for rank in range(count)]
