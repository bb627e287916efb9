"""Each aggregation against the numbers themselves, whole and from the sums of two ranks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_ext.pruning.aggregations import AGGREGATIONS

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.abs().mean(0),
    "l2": lambda x: torch.linalg.vector_norm(x, dim=0),
    "var": lambda x: x.var(0, unbiased=False),
}


def test_every_one_has_a_plain_form() -> None:
    assert PLAIN.keys() == AGGREGATIONS.keys()


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_sums_of_two_ranks_are_those_of_one(name: str) -> None:
    x = torch.randn(11, 3, generator=torch.Generator().manual_seed(5))
    own = AGGREGATIONS[name]
    together = own.sums(x[:4]) + own.sums(x[4:])
    torch.testing.assert_close(own.value(together, 11), PLAIN[name](x.double()), rtol=1e-6, atol=1e-9)
