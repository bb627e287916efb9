"""Causal attention and its gradients, in tiles, against the definition in float64."""

import pytest
import torch
from torch import Tensor

from megatron_ext.ops.causal_attention import cpu, naive


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("tile", [(6, 5), (64, 8), (12, 64)], ids=["many", "of keys", "of queries"])
def test_agrees_with_the_definition(
    monkeypatch: pytest.MonkeyPatch, heads: int, groups: int, tile: tuple[int, int]
) -> None:
    """Of 23 tokens, so that tiles end anywhere, as views of (s, b, n, d), with scores far from each other."""
    monkeypatch.setattr(cpu, "ROWS", tile[0])
    monkeypatch.setattr(cpu, "KEYS", tile[1])
    leaves = [normal(23, 2, n, 8, seed=i) for i, n in enumerate((heads, groups, groups))]
    leaves[0][:, 1] *= 20
    for leaf in leaves:
        leaf.requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got = cpu.causal_attention(*(t.permute(1, 2, 0, 3) for t in leaves), 0.4)
    right = naive.causal_attention(*(t.permute(1, 2, 0, 3) for t in exact), 0.4)
    dout = normal(*got.shape, seed=3)
    gradients = torch.autograd.grad(got, leaves, dout), torch.autograd.grad(right, exact, dout.double())
    for a, b in zip((got, *gradients[0]), (right, *gradients[1]), strict=True):
        assert (a.double() - b).abs().max() < 1e-5 * b.abs().max()


def test_a_score_that_no_query_may_see_is_not_finite() -> None:
    """Keys after a query may have any score with it."""
    q, k, v = (normal(1, 1, 4, 8, seed=i).requires_grad_() for i in range(3))
    with torch.no_grad():
        k[:, :, -1] = 1e4 * q[:, :, 0]
    out = cpu.causal_attention(q, k, v, 1.0)
    for gradient in torch.autograd.grad(out[:, :, :-1].sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_only_where_it_pays() -> None:
    long, short = torch.zeros(1, 1, 512, 8), torch.zeros(1, 1, 511, 8)
    assert [cpu.pays(q) for q in (long, short, long.bfloat16(), long.double())] == [True, False, False, False]
