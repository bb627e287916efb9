"""Attention to a cache against torch's on what the cache holds: under the interpreter on a CPU, compiled on a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.ops.cached_attention import naive
from megatron_ext.ops.cached_attention import triton as kernels

pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("attend", [naive.attend, kernels.attend], ids=["naive", "triton"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "d", "length", "position"),
    [(2, 4, 2, 16, 300, 129), (1, 6, 1, 40, 70, 0), (3, 4, 4, 64, 130, 129), (1, 20, 1, 16, 65, 63)],
)
def test_agrees_with_attention_to_what_is_held(
    attend, dtype: torch.dtype, batch: int, heads: int, groups: int, d: int, length: int, position: int
) -> None:
    """What lies beyond the position is not a number, and must not be seen."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query, keys, values = normal(batch, heads, d), normal(length, batch, groups, d), normal(length, batch, groups, d)
    held = position + 1
    q, k, v = query.double()[:, :, None], *(t[:held].double().permute(1, 2, 0, 3) for t in (keys, values))
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.7 / math.sqrt(d), enable_gqa=True)[:, :, 0]
    keys[held:], values[held:] = torch.nan, torch.nan
    given = (query.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), torch.tensor([position], device=DEVICE))
    got = attend(*given, 0.7 / math.sqrt(d))
    assert got.dtype == dtype
    error = (got.double().cpu() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype]
