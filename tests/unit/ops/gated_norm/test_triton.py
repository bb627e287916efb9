"""The Triton norm against its definition in float64, under the interpreter or on a GPU."""

import pytest
import torch
from mixer_oracle import compare, normal

from megatron_ext.errors import ConfigError
from megatron_ext.ops.gated_norm import naive, triton

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_agrees_with_the_definition(gated: bool, before: bool) -> None:
    leaves = {"x": normal(2, 3, 12), "weight": normal(12, seed=1), "z": normal(2, 3, 12, seed=2) if gated else None}
    more = {"eps": 1e-2, "group_size": 6, "norm_before_gate": before}
    compare(
        lambda **given: triton.gated_rms_norm(**given, **more),
        lambda **given: naive.gated_rms_norm(**given, **more),
        leaves,
    )


def test_errors() -> None:
    with pytest.raises(ConfigError, match="no such groups"):
        triton.gated_rms_norm(torch.zeros(1, 4, 6), torch.zeros(6), group_size=4)
