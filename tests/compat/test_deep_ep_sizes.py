"""Settings and sizes: DeepEP's numbers, checked as it checks them."""

from __future__ import annotations

import pytest

from raynixl import ConfigError
from raynixl.compat.deep_ep import Buffer, Config, ElasticBuffer
from raynixl.compat.deep_ep.config import low_latency_size

pytestmark = pytest.mark.pure


class Group:
    world = 4


def test_a_config_keeps_its_settings_and_rounds_up_as_deepep_does():
    config = Config(24, 8, 256, 6, 128)
    assert config.num_sms == 24
    assert config.num_max_rdma_chunked_recv_tokens == 132
    assert Config() == Config(20, 6, 256, 6, 256)


@pytest.mark.parametrize(
    "settings", [(20, 0, 256), (20, 256, 256), (-1, 6, 256), (20, 6, 256, 0, 128), (20, 6, 256, 8, 8)]
)
def test_settings_that_deepep_refuses_are_refused(settings):
    with pytest.raises(ConfigError, match="none that DeepEP takes"):
        Config(*settings)


def test_size_hints_are_those_of_queues_and_zero_between_nodes_of_one():
    config = Buffer.get_dispatch_config(8)
    assert config.get_rdma_buffer_size_hint(14336, 8) == 0
    assert config.get_rdma_buffer_size_hint(14336, 16) > 0
    one = 14336 + 8 + 128 * 12 + 128 * 4
    assert config.get_nvl_buffer_size_hint(14336, 8) == -(-10 * 8 * (5 * 4 + 256 * one) // 128) * 128


def test_the_low_latency_size_is_that_of_deepep():
    # 288 experts, 128 tokens: two of: rows to send back, rows to receive, signals; each row 7168 bf16 and 56 ranges
    row = 7168 * 2 + 56 * 4
    total = 2 * (288 * 128 * row + 288 * 128 * max(row, 16 + 7168 * 2) + 288 * 4)
    assert low_latency_size(128, 7168, 288) == (total + 128) // 128 * 128
    assert Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 288) == low_latency_size(128, 7168, 288)


def test_elastic_sizes_are_multiples_of_two_mib_and_grow():
    small = ElasticBuffer.get_buffer_size_hint(Group(), 128, 1024, num_topk=8)
    large = ElasticBuffer.get_buffer_size_hint(Group(), 1024, 1024, num_topk=8, use_fp8_dispatch=True)
    assert small % (2 << 20) == large % (2 << 20) == 0
    assert 0 < small < large


def test_the_number_of_sms_is_kept_and_must_be_even(monkeypatch):
    monkeypatch.setattr(Buffer, "num_sms", 20)
    Buffer.set_num_sms(24)
    assert Buffer.num_sms == Buffer.get_combine_config(4).num_sms == 24
    with pytest.raises(ConfigError, match="even"):
        Buffer.set_num_sms(5)
    assert Buffer.is_sm90_compiled()
