"""The catalogue: each model has just the tensors, parameters and bytes that it is published with."""

import math

import pytest

from raynixl.errors import ConfigError
from raynixl.weights.architecture import Split
from raynixl.weights.catalogue import names, parameters
from raynixl.weights.layout import itemsize

pytestmark = pytest.mark.pure

# Tensors and parameters as the published indexes and model cards have them.
PUBLISHED = [
    ("qwen2.5-0.5b", {}, 290, 494_032_768, 988_065_536),
    ("qwen2.5-7b", {}, 339, 7_615_616_512, 15_231_233_024),
    ("llama-3.1-8b", {}, 291, 8_030_261_248, 16_060_522_496),
    ("qwen3-30b-a3b", {}, 18_867, 30_532_122_624, 61_064_245_248),
    ("qwen3-235b-a22b", {}, 36_945, 235_093_634_560, 470_187_269_120),
    ("deepseek-v3", {}, 45_395, 671_026_419_200, 1_342_052_838_400),
    ("deepseek-v3", {"fp8": True, "mtp": True}, 91_991, 684_531_386_000, 688_574_839_360),
    ("kimi-k2", {}, 69_975, 1_026_408_232_448, 2_052_816_464_896),
]


@pytest.mark.parametrize(("model", "form", "tensors", "count", "nbytes"), PUBLISHED)
def test_a_model_has_the_tensors_it_is_published_with(model, form, tensors, count, nbytes):
    infos = [one.info for one in parameters(model, **form)]
    counts = [math.prod(info.shape) for info in infos]
    assert (len(infos), len({info.name for info in infos}), sum(counts)) == (tensors, tensors, count)
    assert sum(n * itemsize(info.dtype) for n, info in zip(counts, infos, strict=True)) == nbytes


def test_the_tensors_of_kimi_are_experts_attention_gates_and_few_others():
    found = parameters("kimi-k2")
    assert sum(one.expert is not None for one in found) == 60 * 384 * 3
    assert sum("self_attn" in one.info.name or "layernorm.weight" in one.info.name for one in found) == 61 * 9
    assert sum(".gate." in one.info.name for one in found) == 60 * 2
    assert sum("shared_experts" in one.info.name for one in found) == 60 * 3


def test_every_layer_of_a_qwen_is_named_as_transformers_names_it():
    transformers = pytest.importorskip("transformers")
    import torch

    config = transformers.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151_936, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    real = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert {one.info.name: one.info.shape for one in parameters("qwen2.5-0.5b")} == real


def test_what_is_split_divides_into_eight():
    for model in names():
        for one in parameters(model):
            dim = 1 if one.split is Split.ROW else 0
            assert one.split is Split.WHOLE or one.info.shape[dim] % 8 == 0, one
            assert one.units is None or one.info.shape[dim] % one.units == 0, one


@pytest.mark.parametrize(
    ("model", "form", "message", "hint"),
    [
        ("kimi-k3", {}, "no model 'kimi-k3'", "did you mean kimi-k2?"),
        ("gpt", {}, "no model 'gpt'", "there are: qwen2.5-0.5b"),
        ("llama-3.1-8b", {"fp8": True}, "FP8", "leave fp8 out"),
        ("kimi-k2", {"mtp": True}, "further tokens", "leave mtp out"),
    ],
)
def test_what_the_catalogue_lacks_is_said(model, form, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        parameters(model, **form)
    assert hint in caught.value.hint
