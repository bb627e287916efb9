"""What is drawn into a parameter depends on neither its type nor its split."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from megatron_ext.vision.linears import PlainLinears, fill


def drawn(dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.empty(200, 100, dtype=dtype))
    fill(weight, PlainLinears(), lambda t: nn.init.trunc_normal_(t, std=0.02))
    return weight.detach()


def test_a_type_of_16_bits_has_no_outliers() -> None:
    expected = drawn(torch.float32)
    assert expected.abs().max() < 0.12, "6 deviations"
    assert torch.equal(drawn(torch.bfloat16), expected.bfloat16())


def test_ranks_have_parts_of_one_weight() -> None:
    expected, parts = drawn(torch.float32), []
    for rank in range(2):
        linears: Any = SimpleNamespace(size=2, rank=rank)
        weight: Any = nn.Parameter(torch.empty(200, 50))
        weight.tensor_model_parallel, weight.partition_dim = True, 1
        torch.manual_seed(0)
        fill(weight, linears, lambda t: nn.init.trunc_normal_(t, std=0.02))
        parts.append(weight.detach())
    assert torch.equal(torch.cat(parts, 1), expected)
