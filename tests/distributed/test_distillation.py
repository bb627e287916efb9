"""The losses of a vocabulary that is split over ranks are those of the whole one, and so are their gradients."""

import pytest
import torch
import torch.distributed as dist
from distributed.runner import run_ranks
from torch import Tensor

from megatron_ext.distillation.losses import distillation_losses

COLUMNS = 16


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(2, 5, COLUMNS, generator=torch.Generator().manual_seed(seed))


def losses_of_a_part(tokens: int, temperature: float) -> tuple[Tensor, ...]:
    """What one rank computes, and the gradient of its columns."""
    rank, size = dist.get_rank(), dist.get_world_size()
    columns = slice(rank * COLUMNS // size, (rank + 1) * COLUMNS // size)
    student = logits(1)[..., columns].clone().requires_grad_()
    labels = torch.arange(10).view(2, 5)
    losses = distillation_losses(
        student,
        logits(2)[..., columns],
        labels,
        temperature=temperature,
        kd_weight=0.75,
        ce_weight=0.25,
        vocab_size=tokens,
        group=dist.group.WORLD if size > 1 else None,
    )
    losses.total.backward(torch.linspace(0, 1, 10).view(2, 5))
    assert student.grad is not None
    return *(loss.detach() for loss in losses), student.grad


@pytest.mark.parametrize(("ranks", "tokens"), [(2, 16), (2, 13), (4, 13), (4, 11)])
def test_a_split_vocabulary_changes_nothing(ranks: int, tokens: int) -> None:
    """Of 11 tokens the last of four ranks has none: its columns are padding."""
    (expected,) = run_ranks(losses_of_a_part, 1, tokens, 1.5)
    parts = run_ranks(losses_of_a_part, ranks, tokens, 1.5)
    for part in parts:
        torch.testing.assert_close(part[:3], expected[:3], rtol=1e-6, atol=1e-6)
    gradient = torch.cat([part[3] for part in parts], dim=-1)
    torch.testing.assert_close(gradient, expected[3], rtol=1e-5, atol=1e-7)
