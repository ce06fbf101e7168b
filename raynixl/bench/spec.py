"""What one run of the transfer benchmark measures, and what cannot be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from raynixl.bench.names import check_baselines
from raynixl.config import default_copy_threads
from raynixl.errors import ConfigError
from raynixl.memory import available_nbytes

CUDA_BASELINES = ("cudamemcpy", "cudamemcpy_loop", "cudamemcpy_loop_c")
BASELINES = ("memcpy", "process_vm", "ucx_perftest", "nixl", "socket", *CUDA_BASELINES)
VRAM = "vram"
_HERE = ("memcpy", "process_vm", *CUDA_BASELINES)
_CARRY_VRAM = ("nvlink", "ucx")


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """What to measure."""

    sizes: tuple[int, ...]
    backend: str = "shm"
    op: str = "write"
    memory: str = "arena"
    """Kind of our memory, and of the target's unless `target_memory` says another."""
    target_memory: str = ""
    gpus: tuple[int, int] = (0, 0)
    """The GPUs of our memory and of the target's, where these are on one."""
    blocks: int = 1
    is_random: bool = False
    threads: int = field(default_factory=default_copy_threads)
    rounds: int = 7
    baselines: tuple[str, ...] = ()
    is_verified: bool = True
    is_busy: bool = False
    """Measure once more while a pure-Python thread keeps the initiator's interpreter busy."""
    ucx: Mapping[str, str] = field(default_factory=dict)
    """Options of UCX for both agents and for the baselines that use UCX, without the prefix UCX_."""
    launch: tuple[str, ...] = ()
    """Command that starts the target, and those of the baselines, elsewhere: it stands before theirs."""

    @property
    def is_write(self) -> bool:
        """Whether bytes go from the measuring process to the target."""
        return self.op == "write"

    @property
    def memories(self) -> tuple[str, str]:
        """The kinds of our memory and of the target's."""
        return self.memory, self.target_memory or self.memory

    @property
    def memory_name(self) -> str:
        """What a row calls the memory: its kind, or ours and the target's."""
        ours, theirs = self.memories
        return ours if ours == theirs else f"{ours}/{theirs}"

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: says what and why.
        """
        check_baselines(self.baselines, BASELINES)
        if "process_vm" in self.baselines and self.backend == "loopback":
            raise ConfigError("process_vm moves bytes between processes", hint="leave it out with loopback")
        if self.launch and self.backend == "loopback":
            raise ConfigError("loopback moves bytes inside one process", hint="leave --launch out")
        if self.launch and any(name in _HERE for name in self.baselines):
            raise ConfigError("memcpy and process_vm stay on this host", hint="compare with socket or ucx_perftest")
        self._check_vram()
        block, layout = max(self.sizes), max(self.sizes) * self.blocks
        own = {"memcpy": layout, "ucx_perftest": 4 * block, "nixl": 2 * layout}
        need = 2 * layout + sum(own.get(name, 0) for name in self.baselines)
        if need > available_nbytes() * 0.8:
            raise ConfigError(
                f"{need / 1e9:.1f} GB are needed but only {available_nbytes() / 1e9:.1f} are free",
                hint="ask for smaller --sizes or fewer --blocks",
            )

    def _check_vram(self) -> None:
        """Refuse baselines that do not reach the memory, and backends that do not."""
        cuda = [name for name in self.baselines if name in CUDA_BASELINES]
        if VRAM not in self.memories:
            if cuda:
                raise ConfigError(f"{cuda[0]} copies memory of a GPU", hint="add --memory vram or --target-memory vram")
            return
        if self.backend not in _CARRY_VRAM:
            raise ConfigError(f"{self.backend} carries no memory of a GPU", hint=f"choose of: {', '.join(_CARRY_VRAM)}")
        if others := [name for name in self.baselines if name not in CUDA_BASELINES]:
            raise ConfigError(
                f"{others[0]} is measured with host memory only", hint=f"compare with {', '.join(CUDA_BASELINES)}"
            )
        if cuda and self.memories[1] not in ("arena", VRAM):
            raise ConfigError(
                f"{cuda[0]} does not reach the target's {self.memories[1]} memory", hint="give the target an arena"
            )
