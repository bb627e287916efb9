"""How many numbers become one: over the tokens of a sample, and over the samples what was made of each.

One entry of `AGGREGATIONS` makes a value of `--prune-sequence-aggregation` and `--prune-batch-aggregation`, also one
that another package adds:

    AGGREGATIONS["l4"] = Aggregation(lambda x: (x**4,), lambda sums, count: sums[0] ** 0.25)

Ranks hold other tokens and other samples, so that an aggregation is made of sums.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Aggregation:
    """One way.

    Attributes:
        terms: What of each number is added up, elementwise.
        value: What comes of the sums, one for each term, and of how many numbers there were.
    """

    terms: Callable[[Tensor], tuple[Tensor, ...]]
    value: Callable[[Tensor, float | Tensor], Tensor]

    def sums(self, x: Tensor) -> Tensor:
        """The sums over dimension 0 of (n, ...), as (terms, ...) in float64."""
        return torch.stack([term.sum(dim=0) for term in self.terms(x)]).double()


def _variance(sums: Tensor, count: float | Tensor) -> Tensor:
    return (sums[1] / count - (sums[0] / count).square()).clamp_min(0)


AGGREGATIONS: dict[str, Aggregation] = {
    "mean": Aggregation(lambda x: (x.abs(),), lambda sums, count: sums[0] / count),
    "l2": Aggregation(lambda x: (x.square(),), lambda sums, count: sums[0].sqrt()),
    "var": Aggregation(lambda x: (x.double(), x.double().square()), _variance),
}
"""The mean magnitude, the L2 norm, and the (population) variance (Minitron, arXiv 2407.14679)."""
