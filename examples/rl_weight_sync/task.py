"""The task: read digits as text and write them sorted, so "314159>" is answered with "113459"."""

import torch
from torch import Tensor

ALPHABET = "0123456789>"
DIGITS = ANSWER_LENGTH = 6
LENGTH = DIGITS + 1 + ANSWER_LENGTH


def draw_prompts(count: int, generator: torch.Generator) -> Tensor:
    """Draw prompts of random digits, each closed by ">"."""
    digits = torch.randint(10, (count, DIGITS), generator=generator)
    return torch.nn.functional.pad(digits, (0, 1), value=ALPHABET.index(">"))


def score(tokens: Tensor) -> Tensor:
    """Return for each sequence the fraction of answer positions that are right."""
    digits, answer = tokens[:, :DIGITS], tokens[:, DIGITS + 1 :]
    return (answer == digits.sort(dim=1).values).float().mean(dim=1)


def show(tokens: Tensor) -> str:
    """Return one sequence as the text it stands for."""
    return "".join(ALPHABET[token] for token in tokens)
