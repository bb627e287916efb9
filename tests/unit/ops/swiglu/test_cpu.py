"""SwiGLU in blocks against its definition in float64."""

import pytest
import torch
from torch import Tensor

from megatron_ext.ops.cache_blocks import BLOCK_ELEMENTS
from megatron_ext.ops.swiglu import cpu, naive


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_agrees_with_the_definition(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, error: float) -> None:
    """In blocks of 2 tokens and then 1, on a view of a wider tensor, with gates that saturate."""
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", 2 * 10)
    wide = (normal(5, 1, 16) * torch.tensor([1.0, 40.0] * 8, dtype=torch.float64)).to(dtype)
    given = wide[..., 3:13].requires_grad_()
    exact = given.detach().double().requires_grad_()
    got, right = cpu.swiglu(given), naive.swiglu(exact)
    assert got.dtype == dtype
    dy = normal(5, 1, 5, seed=1).to(dtype)
    (d_got,), (d_right,) = torch.autograd.grad(got, given, dy), torch.autograd.grad(right, exact, dy.double())
    assert d_got.dtype == dtype
    for a, b in ((got, right), (d_got, d_right)):
        assert (a.double() - b).abs().max() < error * b.abs().max()


def test_gates_without_a_finite_exponential() -> None:
    y = torch.tensor([[-1000.0, 1000.0, 2.0, 3.0]], requires_grad=True)
    out = cpu.swiglu(y)
    (dy,) = torch.autograd.grad(out.sum(), y)
    assert out.tolist() == [[0.0, 3000.0]]
    assert dy.tolist() == [[0.0, 3.0, 0.0, 1000.0]]
