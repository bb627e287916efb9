"""The losses of single tokens and their gradients, made in chunks, against the plain formula in float64."""

import pytest
import torch
from torch import Tensor

from megatron_ext.lm_head import fused_loss, losses, naive, token_losses
from megatron_ext.lm_head.fused_loss import LMHead
from megatron_ext.lm_head.vocab_parallel import VocabParallel
from tests.unit.lm_head.test_fused_loss import Bucket

TOKENS, WORDS, HIDDEN = 10, 50, 6
MASK = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0]).repeat(2).view(5, 2)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Losses, and the gradients of their weighted sum."""
    leaves = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    own = naive.cross_entropy((leaves[0].flatten(0, 1) @ leaves[1].T), labels.flatten()).view(labels.shape)
    return own.detach(), *torch.autograd.grad((own * weights).sum(), leaves)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 3 tokens, slices of 2."""
    monkeypatch.setattr(fused_loss, "CHUNK", {"cpu": 3 * WORDS * 4})
    monkeypatch.setattr(losses, "SLICE", {"cpu": 2 * WORDS})


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("weights", ["the mask's", "others", "none at all"])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("collected", [True, False])
def test_agree_with_the_formula(
    monkeypatch: pytest.MonkeyPatch, small: None, dtype: torch.dtype, error: float, weights: str, kept: bool,
    collected: bool,
) -> None:  # fmt: skip
    """The gradient is right whatever the losses are multiplied with, and in Megatron's buffer where there is one."""
    monkeypatch.setattr(token_losses, "KEPT", {"cpu": 2**20 * kept})
    labels = torch.arange(TOKENS).view(5, 2) * 5
    hidden = normal(5, 2, HIDDEN, seed=1).to(dtype).requires_grad_()
    weight = Bucket(normal(WORDS, HIDDEN, seed=2).to(dtype))
    if collected:
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones(WORDS, HIDDEN), False
    given = {"the mask's": -0.25 * MASK, "others": MASK + torch.arange(10.0).view(5, 2), "none at all": 0 * MASK}[
        weights
    ]
    got = token_losses.token_losses(LMHead(hidden, weight), labels, MASK, VocabParallel(WORDS, WORDS))
    (got * given).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    found = weight.main_grad - 1 if collected else weight.grad
    right = exact(hidden, weight, labels, given.double())
    for a, b in zip((got.detach(), hidden.grad, found), right, strict=True):
        assert (a.double() - b).abs().max() <= error * b.abs().max().clamp_min(1)
    if collected:
        assert weight.grad_added_to_main_grad
        assert weight.grad.layout == torch.sparse_coo


def test_without_a_gradient_and_without_a_mask(small: None) -> None:
    labels = torch.arange(TOKENS).view(5, 2) * 5
    hidden, weight = normal(5, 2, HIDDEN, seed=1).float(), normal(WORDS, HIDDEN, seed=2).float()
    got = token_losses.token_losses(LMHead(hidden, weight), labels, None, VocabParallel(WORDS, WORDS))
    torch.testing.assert_close(got.double(), exact(hidden, weight, labels, MASK.double())[0], rtol=1e-6, atol=1e-6)
    assert not got.requires_grad
