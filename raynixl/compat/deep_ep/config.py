"""Config: DeepEP's settings of its kernels, and the sizes of memory that its users ask for beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from raynixl.errors import ConfigError

NODE_RANKS = 8
"""DeepEP takes so many ranks for one node (its NVLink domain); beyond them its internode forms apply."""

BUFFER_ALIGNMENT = 128
ELASTIC_ALIGNMENT = 2 << 20

_MAX_TOPK = 128
_MAX_SCALES = 128
_SOURCE_NBYTES = 8
_VECTOR_NBYTES = 16


@dataclass(frozen=True, slots=True)
class Config:
    """How many SMs DeepEP's kernels take and how large its chunks are. Checked and kept; nothing here depends on it."""

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        step = self.num_max_rdma_chunked_send_tokens
        sent, received = self.num_max_nvl_chunked_send_tokens, self.num_max_nvl_chunked_recv_tokens
        if self.num_sms < 0 or not 0 < sent < received or step <= 0 or self.num_max_rdma_chunked_recv_tokens <= 0:
            raise ConfigError(
                f"{self} is none that DeepEP takes",
                hint="give chunks of at least 1 token, and receive more than one sends",
            )
        rounded = align(self.num_max_rdma_chunked_recv_tokens, step)
        if 2 * step > rounded:
            raise ConfigError(
                f"{self} is none that DeepEP takes", hint="let num_max_rdma_chunked_recv_tokens be twice the sent ones"
            )
        object.__setattr__(self, "num_max_rdma_chunked_recv_tokens", rounded)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return what DeepEP would take for queues within a node. Nothing is taken here: memory follows use."""
        nodes, peers = max(1, num_ranks // NODE_RANKS), min(num_ranks, NODE_RANKS)
        queues = self.num_sms // 2 * peers
        token = hidden_bytes + _SOURCE_NBYTES + _MAX_TOPK * (8 + 4) + _MAX_SCALES * 4
        return align(queues * ((2 * nodes + 3) * 4 + self.num_max_nvl_chunked_recv_tokens * token), BUFFER_ALIGNMENT)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return what DeepEP would take for queues between nodes: nothing for up to 8 ranks."""
        if num_ranks <= NODE_RANKS:
            return 0
        queues = self.num_sms // 2 * (num_ranks // NODE_RANKS) * 2
        token = hidden_bytes + _SOURCE_NBYTES + _MAX_TOPK * (8 + 4) + _MAX_SCALES * 4 + _VECTOR_NBYTES
        head = (NODE_RANKS * 2 + 2) * 4
        return align(queues * (head + self.num_max_rdma_chunked_recv_tokens * token), BUFFER_ALIGNMENT)


def low_latency_size(tokens: int, hidden: int, experts: int) -> int:
    """Return what DeepEP would take for two low-latency steps of up to `tokens` a rank."""
    scales = hidden // 128
    dispatched = _VECTOR_NBYTES + max(hidden * 2, hidden + scales * 4)
    combined = scales * 4 + hidden * 2
    sent = max(tokens * dispatched, experts * tokens * combined)
    received = experts * tokens * max(dispatched, combined)
    total = 2 * (sent + received + align(experts * 4, 128))
    return (total + BUFFER_ALIGNMENT) // BUFFER_ALIGNMENT * BUFFER_ALIGNMENT


def align(value: int, step: int) -> int:
    """Return the next multiple of `step`."""
    return -(-value // step) * step
