"""The Triton convolution against its definition in float64, under the interpreter or on a GPU."""

from typing import Any

import pytest
import torch
from mixer_oracle import DEVICE, compare, normal
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.ops.causal_conv1d import decode, naive, triton

pytestmark = pytest.mark.triton


@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 3), (11, 4)])
def test_with_state(length: int, taps: int) -> None:
    leaves = {"x": normal(2, length, 6), "weight": normal(6, taps), "bias": normal(6, seed=2)}
    leaves["initial_states"] = normal(2, taps - 1, 6, seed=3)
    compare(
        lambda **given: triton.causal_conv1d(**given, activation="silu"),
        lambda **given: naive.causal_conv1d(**given, activation="silu"),
        leaves,
    )


def test_of_documents() -> None:
    seq_idx = torch.tensor([[0] * 3 + [1] * 5 + [2] + [3] * 2, [0] * 9 + [1] * 2], dtype=torch.int32)
    leaves: dict[str, Tensor | None] = {"x": normal(2, 11, 6), "weight": normal(6, 4, seed=1)}
    compare(
        lambda x, weight: triton.causal_conv1d(x, weight, None, None, seq_idx.to(DEVICE)),
        lambda x, weight: naive.causal_conv1d(x, weight, None, None, seq_idx),
        leaves,
    )


@pytest.mark.parametrize(("width", "held"), [(4, 3), (4, 4), (2, 4), (4, 6)])
def test_one_more_token(width: int, held: int) -> None:
    """The window may hold the token itself and more; slots say which rows it is about."""
    x, window, weight, bias = normal(2, 6), normal(5, 6, held, seed=1), normal(6, width, seed=2), normal(6, seed=3)
    slots = torch.tensor([3, 1])
    single = window.float().to(DEVICE)
    got = triton.conv_step(
        x.float().to(DEVICE), single, weight.float().to(DEVICE), bias.float().to(DEVICE), "silu", slots.to(DEVICE)
    )
    own = window[slots]
    tolerance: dict[str, Any] = {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(got.double().cpu(), decode.conv_step(x, own, weight, bias, "silu"), **tolerance)
    window[slots] = own
    torch.testing.assert_close(single.double().cpu(), window.float().double(), **tolerance)


def test_errors() -> None:
    x = torch.zeros(1, 4, 6)
    with pytest.raises(ConfigError, match="too many taps"):
        triton.causal_conv1d(x, torch.zeros(6, 5))
    with pytest.raises(ConfigError, match="not both"):
        triton.causal_conv1d(x, torch.zeros(6, 4), None, torch.zeros(1, 3, 6), torch.zeros(1, 4, dtype=torch.int32))
