"""The losses of a vocabulary that is split over ranks are those of the whole one, and so are their gradients."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from run_ranks import run_ranks
from torch import Tensor

from megatron_ext.lm_head import fused_loss, naive
from megatron_ext.lm_head.divergences import names
from megatron_ext.lm_head.log_probabilities import log_probabilities
from megatron_ext.lm_head.losses import LMHead, distillation_losses
from megatron_ext.lm_head.objective import Objective
from megatron_ext.lm_head.top_k import teacher_top_k
from megatron_ext.lm_head.vocab_parallel import VocabParallel

COLUMNS = 16
MASK = torch.linspace(0, 1, 10).view(5, 2)
LABELS = torch.arange(10).view(5, 2)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors() -> tuple[Tensor, ...]:
    return normal(5, 2, 6, seed=1), normal(COLUMNS, 6, seed=2), normal(5, 2, 8, seed=3), normal(COLUMNS, 8, seed=4)


def objective(name: str) -> Objective:
    return Objective(name, temperature=1.0 if name in ("mse", "cosine") else 1.5, kd_weight=0.75, ce_weight=0.25, k=6)


def losses_of_a_part(tokens: int) -> list[tuple[Tensor, ...]]:
    """What one rank computes with every divergence, and the gradients of hidden states and its rows of the weight."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * COLUMNS // size, (rank + 1) * COLUMNS // size)
    found = []
    for name, kept in product(names(), (True, False)):
        fused_loss.KEPT["cpu"] = 2**20 * kept
        hidden, weight, other, other_weight = tensors()
        own = LMHead(hidden.requires_grad_(), weight[rows].clone().requires_grad_())
        vocabulary = VocabParallel(COLUMNS // size, tokens, dist.group.WORLD if size > 1 else None)
        losses = distillation_losses(own, LMHead(other, other_weight[rows]), LABELS, MASK, objective(name), vocabulary)
        losses.total.backward()
        assert own.hidden.grad is not None
        assert own.weight.grad is not None
        found.append((*(x.detach() for x in losses[:3]), own.hidden.grad, own.weight.grad))
    return found


@pytest.mark.parametrize(("ranks", "tokens"), [(2, 16), (2, 13), (4, 13), (4, 11)])
def test_a_split_vocabulary_changes_nothing(ranks: int, tokens: int) -> None:
    """Of 11 tokens the last of four ranks has none: its columns are padding. Each part agrees with float64, too."""
    parts = run_ranks(losses_of_a_part, ranks, tokens)
    for i, (name, _) in enumerate(product(names(), (True, False))):
        hidden, weight, *teacher = (x.double() for x in tensors())
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        expected = naive.distillation_losses(
            (hidden, weight), (teacher[0], teacher[1]), LABELS, MASK, objective(name), tokens
        )
        expected[0].backward()
        for part in parts:
            for got, want in zip(part[i][:3], expected, strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-6)
        gradients = sum(part[i][3] for part in parts), torch.cat([part[i][4] for part in parts])
        torch.testing.assert_close(gradients[0].double(), hidden.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients[1].double(), weight.grad, rtol=1e-5, atol=1e-6)


def finite_of_a_part(who: str) -> list[Tensor]:
    """Of each divergence, which tokens one rank finds finite; the last rank's rows of one model are not all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * COLUMNS // size, (rank + 1) * COLUMNS // size)
    hidden, weight, other, other_weight = tensors()
    (weight if who == "student" else other_weight)[-1, 0] = torch.nan
    vocabulary, heads = VocabParallel(COLUMNS // size, COLUMNS, dist.group.WORLD), (LMHead(hidden, weight[rows]),)
    heads += (LMHead(other, other_weight[rows]),)
    return [distillation_losses(*heads, LABELS, MASK, objective(name), vocabulary).finite for name in names()]


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_all_ranks_agree_on_whether_a_teacher_is_finite(who: str) -> None:
    """Or one would stop while the others wait for it."""
    for name, first, second in zip(names(), *run_ranks(finite_of_a_part, 2, who), strict=True):
        assert first.equal(second), name
        assert first.any() == (who == "student"), name


def likeliest_of_a_part(tokens: int) -> list[Tensor]:
    """What one rank finds to be the likeliest six entries, and the rest."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * COLUMNS // size, (rank + 1) * COLUMNS // size)
    _, _, hidden, weight = tensors()
    vocabulary = VocabParallel(COLUMNS // size, tokens, dist.group.WORLD if size > 1 else None)
    kept, finite = teacher_top_k(LMHead(hidden, weight[rows]), vocabulary, 6, temperature=1.5)
    return [kept.index, kept.log_q, kept.log_rest, finite]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_vocabulary_has_the_same_likeliest_entries(ranks: int) -> None:
    """On every rank, though one of four holds nothing but padding."""
    _, _, hidden, weight = tensors()
    logits = (hidden.flatten(0, 1).double() @ weight.double().T)[:, :11]
    expected = naive.top_k(logits / 1.5, 6)
    for got in run_ranks(likeliest_of_a_part, ranks, 11):
        assert got[0].equal(expected.index)
        torch.testing.assert_close(got[1].double(), expected.log_q, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(got[2].double(), expected.log_rest, rtol=1e-5, atol=1e-6)
        assert got[3].all()


def log_probabilities_of_a_part(labels: list[int], tokens: int) -> Tensor:
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * COLUMNS // size, (rank + 1) * COLUMNS // size)
    hidden, weight, *_ = tensors()
    vocabulary = VocabParallel(COLUMNS // size, tokens, dist.group.WORLD if size > 1 else None)
    return log_probabilities(LMHead(hidden, weight[rows]), torch.tensor(labels), vocabulary)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_vocabulary_has_the_same_log_probabilities(ranks: int) -> None:
    """On every rank, though one of four holds nothing but padding."""
    hidden, weight, *_ = (x.double() for x in tensors())
    logits = (hidden.flatten(0, 1) @ weight.T)[:, :11]
    labels = LABELS.flatten().where(torch.arange(10) % 2 == 0, logits.argmax(-1))
    expected = naive.log_probabilities(logits, labels)
    for got in run_ranks(log_probabilities_of_a_part, ranks, labels.tolist(), 11):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=2e-6)
