"""The policy: a small decoder-only transformer that samples its own answers."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

WIDTH, LAYERS, HEADS = 64, 2, 4


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each added to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        projected = self.query_key_value(self.norm_attention(x))
        query, key, value = projected.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Policy(nn.Module):
    """Map token ids (batch, time) to the log-probabilities of the token that follows each."""

    def __init__(self, vocabulary: int, length: int, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, WIDTH)
        self.position = nn.Parameter(torch.randn(length, WIDTH))
        self.blocks = nn.Sequential(*(block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.token(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.blocks(embedded)).float().log_softmax(dim=-1)

    @torch.no_grad()
    def generate(self, prompts: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Continue each prompt by count sampled tokens; return all, and the samples' log-probabilities."""
        tokens, logprobs = prompts, []
        for _ in range(count):
            following = self(tokens)[:, -1]
            action = following.exp().multinomial(1)
            logprobs.append(following.gather(1, action))
            tokens = torch.cat([tokens, action], dim=1)
        return tokens, torch.cat(logprobs, dim=1)

    def logprobs(self, tokens: Tensor, count: int) -> Tensor:
        """Return the log-probabilities of the last count tokens of each sequence."""
        following = self(tokens[:, :-1])[:, -count:]
        return following.gather(2, tokens[:, -count:, None]).squeeze(2)

    def digest(self) -> str:
        """Return a hash of every bit of every parameter and buffer."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()
