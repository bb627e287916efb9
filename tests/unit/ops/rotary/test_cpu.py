"""Rotary position embedding against its definition in float64, and against transformers'."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from megatron_ext.ops.rotary import cpu, naive


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("turned", [8, 6])
@pytest.mark.parametrize(("scale", "interleaved"), [(1.0, False), (1.25, False), (1.25, True)])
def test_agrees_with_the_definition(
    dtype: torch.dtype, error: float, turned: int, scale: float, interleaved: bool
) -> None:
    """On a slice of a wider tensor, whole heads and part of them, with other angles in either half."""
    given = normal(5, 2, 3, 12).to(dtype)[..., 2:10].requires_grad_()
    angles = 3 * normal(5, 1, 1, turned, seed=1)
    exact = given.detach().double().requires_grad_()
    got = cpu.rotary(given, angles.to(torch.promote_types(dtype, torch.float32)), scale, interleaved)
    right = naive.rotary(exact, angles, scale, interleaved)
    assert got.dtype == dtype
    dy = normal(5, 2, 3, 8, seed=2).to(dtype)
    (d_got,), (d_right,) = torch.autograd.grad(got, given, dy), torch.autograd.grad(right, exact, dy.double())
    for a, b in ((got, right), (d_got, d_right)):
        assert (a.double() - b).abs().max() < error * b.abs().max()


def test_agrees_with_transformers() -> None:
    t, half = normal(5, 2, 3, 8), normal(5, 1, 1, 4, seed=1)
    angles = torch.cat([half, half], -1)
    theirs, _ = apply_rotary_pos_emb(
        t.permute(1, 2, 0, 3), t.permute(1, 2, 0, 3), *(f(angles)[:, 0].transpose(0, 1) for f in (torch.cos, torch.sin))
    )
    torch.testing.assert_close(cpu.rotary(t, angles), theirs.permute(2, 0, 1, 3))
    torch.testing.assert_close(naive.rotary(t, angles), theirs.permute(2, 0, 1, 3))
