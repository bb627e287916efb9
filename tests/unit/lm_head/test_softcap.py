"""Losses, log-probabilities and distances of bounded logits against plain formulas in float64, with their gradients."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.lm_head import fused_loss
from megatron_ext.lm_head.fused_loss import LMHead
from megatron_ext.lm_head.log_probabilities import log_probabilities
from megatron_ext.lm_head.logit_distance import squared_distances
from megatron_ext.lm_head.losses import cross_entropy, distillation_losses
from megatron_ext.lm_head.objective import Objective
from megatron_ext.lm_head.vocab_parallel import VocabParallel

GENERATOR = torch.Generator().manual_seed(2)
HIDDEN, WEIGHT, STATES, ROWS = (
    2 * torch.randn(shape, generator=GENERATOR) for shape in ((6, 2, 5), (11, 5), (6, 2, 4), (11, 4))
)
LABELS = torch.randint(11, (6, 2), generator=GENERATOR)
VOCABULARY = VocabParallel(11, 11)


def bounded(hidden: torch.Tensor, weight: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(hidden.double() @ weight.double().T / cap)


@pytest.mark.parametrize("chunk", [1, 2**20])
@pytest.mark.parametrize("kept", [0, 2**20])
def test_losses_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk: int, kept: int) -> None:
    monkeypatch.setitem(fused_loss.CHUNK, "cpu", chunk)
    monkeypatch.setitem(fused_loss.KEPT, "cpu", kept)
    own = [HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()]
    objective = Objective("forward-kl", 1.5, 0.7, 0.4)
    mask = torch.ones(6, 2)
    found = distillation_losses(
        LMHead(own[0], own[1], 3.0), LMHead(STATES, ROWS, 2.0), LABELS, mask, objective, VOCABULARY
    )
    exact: Any = [HIDDEN.double().requires_grad_(), WEIGHT.double().requires_grad_()]
    logits, other = bounded(*exact, 3.0), bounded(STATES, ROWS, 2.0)
    ce = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="sum")
    kd = 1.5**2 * F.kl_div((logits / 1.5).log_softmax(-1), (other / 1.5).softmax(-1), reduction="sum")
    torch.testing.assert_close(found.ce.sum().double(), ce.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.kd.sum().double(), kd.detach(), rtol=1e-5, atol=1e-5)
    found.total.backward()
    (0.7 * kd + 0.4 * ce).backward()
    for left, right in zip(own, exact, strict=True):
        torch.testing.assert_close(left.grad.double(), right.grad, rtol=1e-4, atol=1e-5)


def test_cross_entropy_log_probabilities_and_distances() -> None:
    head = LMHead(HIDDEN, WEIGHT, 3.0)
    logits = bounded(HIDDEN, WEIGHT, 3.0)
    expected = logits.log_softmax(-1).gather(-1, LABELS[..., None])[..., 0]
    found = cross_entropy(head, LABELS, torch.ones(6, 2), VOCABULARY)
    torch.testing.assert_close(found.ce.double(), -expected, rtol=1e-5, atol=1e-5)
    scored = log_probabilities(LMHead(HIDDEN.flatten(0, 1), WEIGHT, 3.0), LABELS.flatten(), VOCABULARY)
    torch.testing.assert_close(scored[0].double(), expected.flatten(), rtol=1e-5, atol=1e-5)
    squares = squared_distances(logits.float(), head, SimpleNamespace(size=lambda: 1))
    torch.testing.assert_close(squares[0], torch.zeros(6, 2), rtol=0, atol=1e-8)
