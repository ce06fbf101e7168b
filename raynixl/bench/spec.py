"""What one run of the transfer benchmark measures, and what cannot be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from raynixl.config import default_copy_threads
from raynixl.errors import ConfigError
from raynixl.memory import available_nbytes

BASELINES = ("memcpy", "process_vm", "ucx_perftest", "nixl", "socket")
_HERE = ("memcpy", "process_vm")


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """What to measure."""

    sizes: tuple[int, ...]
    backend: str = "shm"
    op: str = "write"
    memory: str = "arena"
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

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: says what and why.
        """
        for name in self.baselines:
            if name not in BASELINES:
                raise ConfigError(f"there is no baseline {name!r}", hint=f"known are: {', '.join(BASELINES)}")
        if "process_vm" in self.baselines and self.backend == "loopback":
            raise ConfigError("process_vm moves bytes between processes", hint="leave it out with loopback")
        if self.launch and self.backend == "loopback":
            raise ConfigError("loopback moves bytes inside one process", hint="leave --launch out")
        if self.launch and any(name in _HERE for name in self.baselines):
            raise ConfigError("memcpy and process_vm stay on this host", hint="compare with socket or ucx_perftest")
        block, layout = max(self.sizes), max(self.sizes) * self.blocks
        own = {"memcpy": layout, "process_vm": 0, "ucx_perftest": 4 * block, "nixl": 2 * layout, "socket": 0}
        need = 2 * layout + sum(own[name] for name in self.baselines)
        if need > available_nbytes() * 0.8:
            raise ConfigError(
                f"{need / 1e9:.1f} GB are needed but only {available_nbytes() / 1e9:.1f} are free",
                hint="ask for smaller --sizes or fewer --blocks",
            )
