"""From logits to the next token: the most probable one, or one that is drawn."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Logits are divided by it; 0 takes the most probable token and draws nothing.
        top_k: Draw from this many of the most probable tokens; 0 from all.
        top_p: Draw from the fewest most probable tokens that together have at least this probability ("The Curious Case
            of Neural Text Degeneration", arXiv 1904.09751), after `top_k`.
        seed: Two runs with one seed draw the same, on whatever layout and in whatever batches.

    Raises:
        ConfigError: A value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ConfigError("the temperature of sampling", got=self.temperature, legal="0 (greedy) or more")
        if self.top_k < 0:
            raise ConfigError("top-k of sampling", got=self.top_k, legal="0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top-p of sampling", got=self.top_p, legal="above 0, at most 1")

    def draws(self, request: int, count: int) -> Float[Tensor, " count"]:
        """Numbers from 0 to 1 for the tokens of one request; they depend on the seed and on which request it is."""
        digest = hashlib.sha256(f"{self.seed}/{request}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        return torch.rand(count, dtype=torch.float64, generator=generator)


def choose(
    logits: Float[Tensor, "n v"], sampling: Sampling, draws: Float[Tensor, " n"] | None = None
) -> Int[Tensor, " n"]:
    """The next token of each sequence.

    Args:
        logits: Of the next token.
        sampling: How to choose.
        draws: From 0 to 1; where in the distribution of the tokens, the most probable first, each draw falls.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    assert draws is not None
    probabilities, order = distribution(logits, sampling)
    cumulative = probabilities.cumsum(-1)
    # Strictly below: a token of probability zero is never drawn, not even by 0.
    place = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(-1)
    last = (probabilities > 0).sum(-1) - 1
    return order.gather(-1, torch.minimum(place, last)[:, None])[:, 0]


def distribution(logits: Float[Tensor, "n v"], sampling: Sampling) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """What is drawn from, up to a factor: probabilities, the largest first, and the tokens they belong to."""
    ordered, order = (logits.double() / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        ordered, order = ordered[:, : sampling.top_k], order[:, : sampling.top_k]
    probabilities = ordered.softmax(-1)
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(before < sampling.top_p, 0.0)
    return probabilities, order
