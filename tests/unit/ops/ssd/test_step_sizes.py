"""Step sizes, number by number."""

import math

import pytest
import torch

from megatron_ext.ops.ssd.step_sizes import NO_LIMIT, step_sizes


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("bias", [None, [0.5, -1.0]])
@pytest.mark.parametrize("limit", [NO_LIMIT, (0.1, 1.2)])
def test_bias_then_softplus_then_limits(softplus: bool, bias: list[float] | None, limit: tuple[float, float]) -> None:
    dt = torch.tensor([[-3.0, 0.25], [0.5, 4.0]], dtype=torch.bfloat16)
    found = step_sizes(dt, torch.tensor(bias) if bias else None, softplus, limit)
    for row, values in enumerate(dt.tolist()):
        for head, value in enumerate(values):
            value += bias[head] if bias else 0.0
            value = math.log1p(math.exp(value)) if softplus else value
            if limit != NO_LIMIT:
                value = min(max(value, limit[0]), limit[1])
            assert found[row, head].item() == pytest.approx(value, rel=1e-6)
    assert found.dtype == torch.float32
