"""MESA: the divergence against its formula in NumPy, and its place in the loss."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megatron_ext.vision.agreement import disagreement
from megatron_ext.vision.task import losses

GENERATOR = torch.Generator().manual_seed(0)
OWN, AVERAGE = (torch.randn(4, 7, generator=GENERATOR) * 5 for _ in range(2))


def divergence(own: np.ndarray, average: np.ndarray) -> float:
    """Sum over images of p log(p / q), p and q being exp(logits / 3), normalised."""
    p, q = (np.exp(each / 3) / np.exp(each / 3).sum(1, keepdims=True) for each in (average, own))
    return float((p * np.log(p / q)).sum())


def test_it_is_the_divergence_of_softened_predictions() -> None:
    expected = divergence(OWN.double().numpy(), AVERAGE.double().numpy())
    assert disagreement(OWN, AVERAGE).item() == pytest.approx(expected, rel=1e-5)
    assert disagreement(OWN, OWN).item() == pytest.approx(0, abs=1e-6)
    assert expected > 1


def test_its_gradient_moves_the_network_alone() -> None:
    """By the softmax rule (q - p) / 3."""
    own, average = OWN.clone().requires_grad_(), AVERAGE.clone()
    disagreement(own, average).backward()
    torch.testing.assert_close(own.grad, (torch.softmax(own / 3, 1) - torch.softmax(average / 3, 1)).detach() / 3)


def test_it_counts_fifty_times_its_weight_and_is_a_metric() -> None:
    target = torch.softmax(torch.randn(4, 7, generator=GENERATOR), 1)
    batch = {"label": torch.tensor([0, 3, 6, 1]), "skipped": torch.zeros(4, dtype=torch.int64), "target": target}
    plain, _, found = losses(batch, OWN)
    assert "mesa" not in found
    assert losses(batch, OWN, mesa=0.5)[0] == plain, "before it begins there is no average in the batch"
    total, count, found = losses(batch | {"average": AVERAGE}, OWN, mesa=0.5)
    expected = -(target * F.log_softmax(OWN, 1)).sum().item()
    apart = divergence(OWN.double().numpy(), AVERAGE.double().numpy())
    assert total.item() == pytest.approx(expected + 0.5 * 50 * apart, rel=1e-5)
    assert found["loss"][0].item() == pytest.approx(expected)
    assert (found["mesa"][0].item(), count) == (pytest.approx(apart, rel=1e-5), 4)
