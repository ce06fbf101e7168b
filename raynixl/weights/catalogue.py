"""Catalogue: public models by name, and the parameters that each one's checkpoint holds."""

from __future__ import annotations

import difflib

from raynixl.errors import ConfigError
from raynixl.weights.architecture import Architecture, Experts, Grouped, Latent, Parameter, parameters_of

_MLA = (1536, 512, 128, 64, 128)

# From the config.json that each model is published with.
_MODELS = {
    "qwen2.5-0.5b": Architecture(
        layers=24, hidden=896, inner=4864, vocabulary=151_936, attention=Grouped(14, 2, 64, has_bias=True), is_tied=True
    ),
    "qwen2.5-7b": Architecture(
        layers=28, hidden=3584, inner=18_944, vocabulary=152_064, attention=Grouped(28, 4, 128, has_bias=True)
    ),
    "llama-3.1-8b": Architecture(
        layers=32, hidden=4096, inner=14_336, vocabulary=128_256, attention=Grouped(32, 8, 128)
    ),
    "qwen3-30b-a3b": Architecture(
        layers=48, hidden=2048, inner=6144, vocabulary=151_936,
        attention=Grouped(32, 4, 128, has_norms=True), experts=Experts(128, 768),
    ),
    "qwen3-235b-a22b": Architecture(
        layers=94, hidden=4096, inner=12_288, vocabulary=151_936,
        attention=Grouped(64, 4, 128, has_norms=True), experts=Experts(128, 1536),
    ),
    "deepseek-v3": Architecture(
        layers=61, hidden=7168, inner=18_432, vocabulary=129_280,
        attention=Latent(128, *_MLA), experts=Experts(256, 2048, first=3, has_shared=True), mtp=1,
    ),
    "kimi-k2": Architecture(
        layers=61, hidden=7168, inner=18_432, vocabulary=163_840,
        attention=Latent(64, *_MLA), experts=Experts(384, 2048, first=1, has_shared=True),
    ),
}  # fmt: skip


def names() -> list[str]:
    """Return the names of all models, small ones first."""
    return list(_MODELS)


def architecture(model: str) -> Architecture:
    """Return the numbers of a model.

    Raises:
        ConfigError: it is not in the catalogue.
    """
    found = _MODELS.get(model.lower())
    if found is None:
        near = difflib.get_close_matches(model.lower(), _MODELS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(_MODELS)}"
        raise ConfigError(f"there is no model {model!r:.80} in the catalogue", hint=hint)
    return found


def parameters(model: str, *, fp8: bool = False, mtp: bool = False) -> tuple[Parameter, ...]:
    """Return the parameters of a model's checkpoint; see `parameters_of`.

    Raises:
        ConfigError: it is not in the catalogue, or has no such form.
    """
    own = architecture(model)
    if fp8 and not isinstance(own.attention, Latent):
        raise ConfigError(f"{model} is not published with FP8 blocks of 128 x 128", hint="leave fp8 out")
    if mtp and not own.mtp:
        raise ConfigError(f"{model} has no layers that predict further tokens", hint="leave mtp out")
    return parameters_of(own, fp8=fp8, mtp=mtp)
