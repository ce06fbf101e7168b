"""DeepEP's interface on raynixl: `import raynixl.compat.deep_ep as deep_ep`; code for it runs without a GPU, too."""

from __future__ import annotations

import torch

from raynixl.compat.deep_ep.buffer import Buffer
from raynixl.compat.deep_ep.config import Config
from raynixl.compat.deep_ep.domains import get_logical_domain_size, get_physical_domain_size
from raynixl.compat.deep_ep.elastic import ElasticBuffer, EPHandle
from raynixl.compat.deep_ep.events import EventHandle, EventOverlap
from raynixl.compat.deep_ep.replacing import install

topk_idx_t = torch.int64
__version__ = "2.1.0"
"""The version of DeepEP whose interface this is."""

__all__ = [
    "Buffer", "Config", "ElasticBuffer", "EPHandle", "EventHandle", "EventOverlap", "get_logical_domain_size",
    "get_physical_domain_size", "install", "topk_idx_t",
]  # fmt: skip
