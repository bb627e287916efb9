"""The three measures of change of tokens that have no direction, against torch's own cosine."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.pruning import depth
from megatron_ext.pruning.depth_metrics import changes


def change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return depth.change(before, after, changes().values())


def streams(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    before, update = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return before, before + 0.3 * update


def test_a_token_whose_stream_is_zero_is_not_counted():
    """One row of an embedding that was never trained."""
    before, after = streams(5, 2, 8)
    others = torch.ones(5, 2, dtype=torch.bool)
    others[3, 1] = False
    before[3, 1] = 0
    found = change(before, after)
    expected = change(before[others][:, None], after[others][:, None])
    torch.testing.assert_close(found, expected)
    assert found[-1] == 9
    torch.testing.assert_close(
        found[0], (1 - F.cosine_similarity(before, after, dim=-1))[others].sum(), rtol=1e-5, atol=0
    )


def test_a_stream_that_becomes_zero_has_turned_by_one():
    before, after = streams(4, 1, 8)
    after[2] = 0
    found = change(before, after)
    torch.testing.assert_close(found[0], (1 - F.cosine_similarity(before, after, dim=-1)).sum(), rtol=1e-5, atol=0)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_at_all_is_no_change(dtype):
    assert change(torch.zeros(3, 2, 4, dtype=dtype), torch.zeros(3, 2, 4, dtype=dtype)).tolist() == [0, 0, 0, 0]
