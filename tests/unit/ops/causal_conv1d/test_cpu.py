"""The causal convolution against its definition and against torch's own convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.ops.cache_blocks import BLOCK_ELEMENTS
from megatron_ext.ops.causal_conv1d import cpu, naive


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 12),
    taps=st.integers(1, 5),
    extra=st.sampled_from(["none", "state", "documents"]),
    bias=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
    block=st.sampled_from([1, 2, 5, 100]),
)
def test_agrees_with_the_definition(
    length: int, taps: int, extra: str, bias: bool, activation: str | None, block: int
) -> None:
    batch, channels = 2, 6
    leaves = [normal(batch, length, channels, seed=1), normal(channels, taps, seed=2)]
    if bias:
        leaves.append(normal(channels, seed=3))
    if extra == "state":
        leaves.append(normal(batch, taps - 1, channels, seed=4))
    seq_idx = torch.arange(length).div(3, rounding_mode="floor").expand(batch, -1) if extra == "documents" else None
    outcomes = []
    for f in (naive.causal_conv1d, cpu.causal_conv1d):
        own = [t.clone().requires_grad_() for t in leaves]
        x, weight, *rest = own
        b = rest.pop(0) if bias else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(BLOCK_ELEMENTS, "cpu", block * batch * channels)
            y, final = f(x, weight, b, rest[0] if rest else None, seq_idx, activation)
            loss = (y * normal(*y.shape, seed=5)).sum() + (final * normal(*final.shape, seed=6)).sum()
            outcomes.append([y, final, *torch.autograd.grad(loss, own)])
    for right, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, right)


def test_agrees_with_torch() -> None:
    x, weight, bias = normal(2, 40, 16), normal(16, 4, seed=1), normal(16, seed=2)
    expected = F.conv1d(F.pad(x.mT, (3, 0)), weight.unsqueeze(1), bias, groups=16).mT
    torch.testing.assert_close(cpu.causal_conv1d(x, weight, bias)[0], expected)
    torch.testing.assert_close(cpu.causal_conv1d(x, weight, bias, activation="silu")[0], F.silu(expected))


def test_gradcheck() -> None:
    leaves = [normal(1, 5, 3), normal(3, 4, seed=1), normal(3, seed=2), normal(1, 3, 3, seed=3)]
    for activation in (None, "silu"):
        torch.autograd.gradcheck(
            lambda *a, act=activation: cpu.causal_conv1d(*a, activation=act), [t.requires_grad_() for t in leaves]
        )


def test_bfloat16_is_rounded_once() -> None:
    leaves = [normal(2, 64, 16, dtype=torch.bfloat16), normal(16, 4, seed=1, dtype=torch.bfloat16)]
    exact = naive.causal_conv1d(*(t.double() for t in leaves), activation="silu")[0]
    got = cpu.causal_conv1d(*leaves, activation="silu")[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)


def test_errors() -> None:
    x, weight = normal(1, 5, 3), normal(3, 4)
    for f in (naive.causal_conv1d, cpu.causal_conv1d):
        with pytest.raises(ConfigError, match="gelu"):
            f(x, weight, activation="gelu")
    with pytest.raises(ConfigError, match="not both"):
        cpu.causal_conv1d(x, weight, None, normal(1, 3, 3), torch.zeros(1, 5, dtype=torch.int32))
