"""Real text that every Python brings along: the manual pages behind help()."""

from pydoc_data.topics import topics

import torch
from torch import Tensor

VOCABULARY = 128
LENGTH, SEQUENCES = 48, 8  # characters of a sequence, sequences of a rank's batch


def load_text() -> Tensor:
    """Return the characters of all topics, one after the other."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()


def draw_batch(text: Tensor, step: int, rank: int) -> Tensor:
    """Return what a rank learns from in a step, [sequences, length + 1]: always the same."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    starts = torch.randint(len(text) - LENGTH, (SEQUENCES, 1), generator=generator)
    return text[starts + torch.arange(LENGTH + 1)]
