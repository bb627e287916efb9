"""Distances of logits against whole logits in float64."""

from types import SimpleNamespace

import pytest
import torch

from megatron_ext.lm_head import logit_distance
from megatron_ext.lm_head.fused_loss import LMHead


@pytest.mark.parametrize("at_a_time", [1, 100, 2**24])
def test_the_distance_is_that_of_whole_logits(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    monkeypatch.setattr(logit_distance, "LOGITS_AT_A_TIME", at_a_time)
    generator = torch.Generator().manual_seed(2)
    logits, hidden, weight = (torch.randn(shape, generator=generator) for shape in ((7, 2, 11), (7, 2, 5), (11, 5)))
    found = logit_distance.squared_distances(logits, LMHead(hidden, weight), SimpleNamespace(size=lambda: 1))
    other = torch.einsum("sbh,vh->sbv", hidden.double(), weight.double())
    expected = torch.stack([(logits.double() - other).square().sum(-1), other.square().sum(-1)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
