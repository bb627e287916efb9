"""A text that is scored, and its score."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoglikelihoodRequest:
    """A text, of which the last tokens are scored.

    Attributes:
        tokens: Token ids, at least two.
        first: The first of them that is scored, at least 1; those before it are only context.
    """

    tokens: Sequence[int]
    first: int = 1


@dataclass(frozen=True)
class Loglikelihood:
    """What the model says about a text.

    Attributes:
        log_probabilities: (n,), in nats, of each scored token.
        greedy: (n,) bool: whether the token is the one that greedy decoding would choose.
    """

    log_probabilities: "Tensor"
    greedy: "Tensor"

    @property
    def total(self) -> float:
        """Of all scored tokens together."""
        return float(self.log_probabilities.double().sum())

    @property
    def all_greedy(self) -> bool:
        """Whether greedy decoding would give exactly this text."""
        return bool(self.greedy.all())
