"""The distillation losses against torch's own functions in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.lm_head import fused_loss, losses, naive
from megatron_ext.lm_head.divergences import TopK, names
from megatron_ext.lm_head.losses import LMHead, Losses, distillation_losses
from megatron_ext.lm_head.objective import Objective
from megatron_ext.lm_head.vocab_parallel import VocabParallel

HIDDEN, OTHER = 5, 7


def normal(*shape: int, seed: int) -> Tensor:
    """Numbers that fp32 can hold, in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def heads(length: int, columns: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Hidden states and output weights of student and teacher, of two sequences."""
    student = normal(length, 2, HIDDEN, seed=1).requires_grad_(), normal(columns, HIDDEN, seed=2).requires_grad_()
    return student, (normal(length, 2, OTHER, seed=3), normal(columns, OTHER, seed=4))


def run(
    student: Any, teacher: Any, labels: Tensor, mask: Tensor, objective: Objective, tokens: int
) -> tuple[Losses, LMHead]:
    own = LMHead(*(x.detach().float().requires_grad_() for x in student))
    other = teacher if isinstance(teacher, TopK) else LMHead(*(x.float() for x in teacher))
    return distillation_losses(own, other, labels, mask.float(), objective, VocabParallel(len(own.weight), tokens)), own


def data(length: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Labels, and a mask under which a third of the tokens does not count."""
    labels = torch.randint(tokens, (length, 2), generator=torch.Generator().manual_seed(5))
    return labels, (torch.arange(2 * length).view(length, 2) % 3 > 0).double()


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(1, 9),
    tokens=st.integers(2, 11),
    padding=st.integers(0, 5),
    name=st.sampled_from(names()),
    temperature=st.sampled_from([1.0, 0.05, 0.7, 3.0, 10.0]),
    weights=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)]),
    k=st.integers(1, 11),
    beta=st.sampled_from([0.1, 0.5, 0.8]),
    chunk=st.sampled_from([1, 3, 100]),
    kept=st.booleans(),
    rows=st.sampled_from([1, 2, 100]),
)
def test_agrees_with_torch(
    length: int, tokens: int, padding: int, name: str, temperature: float, weights: tuple[float, float], k: int,
    beta: float, chunk: int, kept: bool, rows: int,
) -> None:  # fmt: skip
    columns = tokens + padding
    objective = Objective(name, temperature, *weights, beta, min(k, tokens))
    if objective.of_logits:
        objective = replace(objective, temperature=1.0)
    student, teacher = heads(length, columns)
    labels, mask = data(length, tokens)
    total, kd, ce = naive.distillation_losses(student, teacher, labels, mask, objective, tokens)
    total.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_loss, "CHUNK", {"cpu": chunk * columns * 8})
        patch.setattr(fused_loss, "KEPT", {"cpu": 2**20 * kept})
        patch.setattr(losses, "SLICE", {"cpu": rows * columns})
        got, own = run(student, teacher, labels, mask, objective, tokens)
        (0.5 * got.total).backward()
    # A divergence is multiplied by the squared temperature, and its rounding with it.
    rounding = 1e-5 * max(1.0, objective.temperature**2 / 10)
    torch.testing.assert_close(got.kd.double(), kd, rtol=1e-5, atol=rounding)
    torch.testing.assert_close(got.ce.double(), ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.total.double(), total, rtol=1e-5, atol=10 * rounding)
    assert bool(got.finite.all())
    for ours, theirs in zip(own[:2], student, strict=True):
        torch.testing.assert_close(2 * ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    assert not own.hidden.grad[mask == 0].any()  # type: ignore[index]


@pytest.mark.parametrize("name", ["top-k", "top-k-rest"])
@pytest.mark.parametrize(("k", "tokens"), [(3, 9), (9, 9), (1, 9)])
def test_stored_entries_count_as_living_ones(name: str, k: int, tokens: int) -> None:
    student, teacher = heads(6, 11)
    labels, mask = data(6, tokens)
    objective = Objective(name, temperature=2.0, ce_weight=0.3, k=k)
    log_q = ((teacher[0].flatten(0, 1) @ teacher[1].T)[:, :tokens] / 2.0).log_softmax(-1)
    kept = log_q.topk(k)
    rest = log_q.scatter(-1, kept.indices, -torch.inf).logsumexp(-1)
    stored = TopK(kept.indices, kept.values.float(), rest.float())
    live, own = run(student, teacher, labels, mask, objective, tokens)
    cached, other = run(student, stored, labels, mask, objective, tokens)
    live.total.backward()
    cached.total.backward()
    torch.testing.assert_close(cached.kd, live.kd, rtol=1e-5, atol=1e-6)
    for a, b in zip(own[:2], other[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gap", [0.1, 1.0, 3.0])
def test_a_rest_that_underflows_still_has_its_gradient(gap: float) -> None:
    """At a low temperature a student may leave less beside the teacher's likeliest entries than fp32 can say."""
    length, columns, tokens = 4, 12, 11
    student, teacher = heads(length, columns)
    for (hidden, weight), size in ((student, gap), (teacher, 0.01)):
        hidden.data.abs_().add_(1)
        weight.data.mul_(0.01)[:3] += 10 * size
    objective = Objective("top-k-rest", temperature=0.3, k=3)
    labels, mask = data(length, tokens)
    total, kd, _ = naive.distillation_losses(student, teacher, labels, mask, objective, tokens)
    total.backward()
    got, own = run(student, teacher, labels, mask, objective, tokens)
    got.total.backward()
    torch.testing.assert_close(got.kd.double(), kd, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(own[:2], student, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)  # logits of up to 700


def test_all_entries_and_no_rest_are_the_whole_divergence() -> None:
    student, teacher = heads(6, 9)
    labels, mask = data(6, 9)
    whole, _ = run(student, teacher, labels, mask, Objective("forward-kl"), 9)
    for name in ("top-k", "top-k-rest"):
        kept, _ = run(student, teacher, labels, mask, Objective(name, k=9), 9)
        torch.testing.assert_close(kept.kd, whole.kd, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", names())
def test_a_teacher_that_is_not_finite_is_seen(name: str) -> None:
    student, teacher = heads(6, 9)
    labels, mask = data(6, 9)
    hidden = teacher[0].clone()
    hidden[2, 1, 0] = torch.nan
    got, _ = run(student, (hidden, teacher[1]), labels, mask, Objective(name, k=3), 9)
    assert (~got.finite).nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize("name", names())
def test_extreme_logits_stay_finite(name: str) -> None:
    student, teacher = heads(4, 9)
    labels, mask = data(4, 9)
    sharp = [[(200 * x).detach() for x in pair[:1]] + [pair[1].detach()] for pair in (student, teacher)]
    got, own = run(sharp[0], sharp[1], labels, mask, Objective(name, ce_weight=1.0, k=3), 9)
    got.total.backward()
    assert got.total.isfinite()
    assert all(x.grad.isfinite().all() for x in own[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", names())
def test_half_precision_rounds_the_logits_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    """Losses are exact to fp32 for the logits as the model's type holds them; gradients are those of the same model."""
    student, teacher = heads(64, 50)
    labels, mask = data(64, 50)
    objective = Objective(name, ce_weight=0.5, k=5)
    half = [tuple(x.detach().to(dtype) for x in pair) for pair in (student, teacher)]
    own = LMHead(*(x.requires_grad_() for x in half[0]))
    got = distillation_losses(own, LMHead(*half[1]), labels, mask.float(), objective, VocabParallel(50, 50))
    got.total.backward()
    made = [((h.flatten(0, 1) @ w.T).detach().double().unflatten(0, (64, 2)), torch.eye(50).double()) for h, w in half]
    logits = made[0][0].requires_grad_()
    total, kd, ce = naive.distillation_losses(made[0], made[1], labels, mask, objective, 50)
    total.backward()
    torch.testing.assert_close(got.kd.double(), kd, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got.ce.double(), ce, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.total.double(), total, rtol=1e-5, atol=0)
    grad, hidden, weight = logits.grad.flatten(0, 1), *(x.detach().double() for x in half[0])  # type: ignore[union-attr]
    for ours, theirs in zip(own[:2], (grad @ weight, grad.T @ hidden.flatten(0, 1)), strict=True):
        error = (ours.grad.double() - theirs.view_as(ours)).norm() / theirs.norm()
        assert error < 0.005


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Objective("kl"), "unknown divergence"),
        (Objective(temperature=0.0), "must be positive"),
        (Objective("mse", temperature=2.0), "knows no temperature"),
        (Objective("jsd", beta=1.0), "between 0 and 1"),
        (Objective("top-k", k=10), "1 to 9"),
    ],
)
def test_illegal_objectives_are_refused(objective: Objective, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective.check(9)
