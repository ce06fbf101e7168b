"""Conversion: what tensors become on their way out: cast, or quantised to FP8 with a scale for each block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from raynixl.errors import ConfigError
from raynixl.weights.selection import Select, selector

BLOCK = 128
FP8 = "float8_e4m3fn"
FP8_MAX = 448.0
SCALE_SUFFIX = "_scale_inv"
"""What DeepSeek's checkpoints and vLLM append to a weight's name to name its scales."""

_REAL = ("float64", "float32", "float16", "bfloat16")
_NOT_QUANTISED = ("*embed*", "*lm_head*", "*norm*", "*.gate.weight", "*router*", "*lora_*")

Cast = str | Mapping[str, str]
"""A dtype for all real tensors, or dtypes by glob; the first glob that matches a name decides."""


@dataclass(frozen=True, slots=True)
class Fp8:
    """Quantise to FP8 e4m3 in blocks of 128 x 128, value = stored * scale, as DeepSeek and vLLM do.

    Without `select` it takes weights of two dimensions or more, of 128 or more each way, but embeddings, output
    heads, norms, routers and adapters.
    """

    select: Select | None = None

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a tensor is quantised."""
        if self.select is not None:
            return selector(self.select)(name)
        is_large = len(shape) >= 2 and min(shape[-2:]) >= BLOCK
        return is_large and name.endswith("weight") and not selector(_NOT_QUANTISED)(name)


@dataclass(frozen=True, slots=True)
class Conversion:
    """What becomes of each tensor, by its name."""

    cast: Cast | None = None
    fp8: Fp8 | None = None
    _globs: tuple[tuple[Callable[[str], bool], str], ...] = field(default=(), repr=False, compare=False)

    @property
    def is_nothing(self) -> bool:
        """Whether all tensors stay what they are."""
        return self.cast is None and self.fp8 is None

    def dtype(self, name: str, dtype: str) -> str:
        """Return what a tensor that is not quantised is cast to: only real numbers are."""
        if dtype not in _REAL:
            return dtype
        return next((target for is_meant, target in self._globs if is_meant(name)), dtype)

    def is_quantised(self, name: str, dtype: str, shape: Sequence[int]) -> bool:
        """Whether a tensor is quantised.

        Raises:
            ConfigError: it is selected but cannot be.
        """
        if self.fp8 is None or not self.fp8.takes(name, shape):
            return False
        if len(shape) < 2 or dtype not in _REAL:
            raise ConfigError(
                f"{name!r:.200}, {dtype} {list(shape)}, cannot be quantised in blocks",
                hint="select matrices of real numbers alone",
            )
        return True


def conversion(cast: Cast | None = None, quantise: str | Fp8 | None = None) -> Conversion:
    """Return what becomes of tensors.

    Raises:
        ConfigError: an argument is unusable.
    """
    by_glob = {} if cast is None else {"*": cast} if isinstance(cast, str) else dict(cast)
    for glob, dtype in by_glob.items():
        if not isinstance(glob, str) or dtype not in _REAL:
            raise ConfigError(f"cast={cast!r:.80} is not known", hint=f"cast to one of {', '.join(_REAL)}")
    if (isinstance(quantise, str) and quantise != "fp8") or not isinstance(quantise, str | Fp8 | None):
        raise ConfigError(f"quantise={quantise!r:.80} is not known", hint="use 'fp8' or Fp8(select=...)")
    globs = tuple((selector(glob), dtype) for glob, dtype in by_glob.items())
    return Conversion(cast, Fp8() if isinstance(quantise, str) else quantise, globs)


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor: one for each block of its last two dimensions."""
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))
