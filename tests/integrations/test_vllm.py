"""vLLM with the backend "raynixl": what a real engine generates after a sync is what a model of those weights does."""

import multiprocessing

import pytest

pytest.importorskip("vllm", reason="make test-vllm installs it in an environment of its own")

import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig

import raynixl as rx
from raynixl.integrations.vllm import init_info, worker_names

pytestmark = [pytest.mark.heavy, pytest.mark.ray, pytest.mark.timeout(600)]

PROMPTS = [[1, 17, 200, 31], [5, 9, 9, 120, 77, 3], [250]]
STD = 0.15  # small weights, as dummy ones, hide that they are the wrong ones


def _model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=STD, max_position_embeddings=256, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def _engine(path, **options):
    return LLM(
        str(path), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=128, max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20, enforce_eager=True, **options,
    )  # fmt: skip


def _tokens(engine):
    parameters = SamplingParams(temperature=0.0, max_tokens=24, detokenize=False, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in PROMPTS], parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _update(engine, version):
    engine.start_weight_update()
    engine.update_weights({"update_info": {"version": version}})
    engine.finish_weight_update(str(version))
    assert engine.reset_prefix_cache()


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def saved(tmp_path):
    """Two models of one shape on disk, as checkpoints."""
    paths = [tmp_path / "old", tmp_path / "new"]
    for seed, path in enumerate(paths):
        _model(seed).save_pretrained(path)
    return paths


def _shut_down(engine):
    engine.llm_engine.engine_core.shutdown()
    for child in multiprocessing.active_children():
        child.join(20)
        assert not child.is_alive()


def _set(publication, trainer, seed):
    with torch.no_grad(), publication.updating():
        for tensor, other in zip(trainer.parameters(), _model(seed).parameters(), strict=True):
            tensor.copy_(other)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_engine_generates_with_what_was_pushed_as_if_it_had_been_loaded(cluster, saved, monkeypatch, workers):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join("01"[:workers]))
    engine = _engine(saved[1], tensor_parallel_size=workers)
    new = _tokens(engine)
    _shut_down(engine)

    trainer = _model(0)
    backend = WeightTransferConfig(backend="raynixl")
    engine = _engine(saved[0], tensor_parallel_size=workers, weight_transfer_config=backend)
    try:
        old = _tokens(engine)
        assert all(a != b for a, b in zip(old, new, strict=True))  # else nothing below would tell anything
        with rx.publish("policy", trainer) as publication:
            engine.init_weight_transfer_engine({"init_info": init_info("policy", trainer)})
            sync = rx.WeightSync("policy", [rx.agent().name], [worker_names("policy", workers)], timeout=60.0)
            _set(publication, trainer, 1)
            report = sync.push(1)
            report.raise_for_excluded()
            norms = 5 * 256 * 2
            share = (sum(one.numel() * 2 for one in trainer.parameters()) - norms) // workers + norms
            assert {rank.nbytes for rank in report.ranks.values()} == {share}
            assert _tokens(engine) == old  # it has landed, and nobody has asked for it yet
            _update(engine, 1)
            assert _tokens(engine) == new
            _set(publication, trainer, 0)
            sync.push(2).raise_for_excluded()
            _update(engine, 2)
            assert _tokens(engine) == old
            if workers == 1:  # vLLM itself does not go on after an error of several workers: their answers are mixed up
                engine.start_weight_update()
                with pytest.raises(Exception, match="version 9 of 'policy' did not come"):
                    engine.update_weights({"update_info": {"version": 9, "timeout": 0.2}})
                assert _tokens(engine) == old
            engine.shutdown_weight_transfer_engine()
    finally:
        _shut_down(engine)
