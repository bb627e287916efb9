"""The distillation losses against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.distillation import losses
from megatron_ext.distillation.losses import distillation_losses


def normal(*shape: int, seed: int) -> Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, tokens: int) -> tuple[Tensor, Tensor]:
    """Both losses per token, by torch's functions."""
    p = F.log_softmax(student[..., :tokens] / temperature, dim=-1)
    q = F.log_softmax(teacher[..., :tokens] / temperature, dim=-1)
    kd = temperature**2 * F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return kd, ce


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 9),
    tokens=st.integers(2, 11),
    padding=st.integers(0, 5),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    weights=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)]),
    rows=st.sampled_from([1, 3, 100]),
)
def test_agrees_with_torch(
    length: int, tokens: int, padding: int, temperature: float, weights: tuple[float, float], rows: int
) -> None:
    columns = tokens + padding
    student = normal(2, length, columns, seed=1).float().double().requires_grad_()
    teacher = normal(2, length, columns, seed=2).float().double()
    labels = torch.randint(tokens, (2, length), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(2 * length).view(2, length) % 3 > 0  # a third of the tokens does not count
    kd, ce = oracle(student, teacher, labels, temperature, tokens)
    ((weights[0] * kd + weights[1] * ce) * mask).sum().backward()

    own = student.detach().float().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "SLICE", rows * columns)
        got = distillation_losses(
            own, teacher.float(), labels, temperature=temperature, kd_weight=weights[0], ce_weight=weights[1],
            vocab_size=tokens,
        )  # fmt: skip
    (got.total * mask).sum().backward()
    torch.testing.assert_close(got.kd.double(), kd, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.ce.double(), ce, rtol=1e-5, atol=1e-5)
    assert own.grad is not None
    assert student.grad is not None
    torch.testing.assert_close(own.grad.double(), student.grad, rtol=1e-4, atol=1e-6)
    assert not own.grad[~mask].any()


def test_leaves_its_inputs_alone() -> None:
    student, teacher = normal(1, 4, 8, seed=1).float(), normal(1, 4, 8, seed=2).float()
    before = student.clone(), teacher.clone()
    distillation_losses(student, teacher, torch.zeros(1, 4, dtype=torch.long))
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_sixteen_bit_logits_lose_nothing_in_the_sums() -> None:
    """Arithmetic is fp32: only the gradient is rounded to the logits' type."""
    student = normal(2, 3, 64, seed=1).bfloat16().requires_grad_()
    teacher = normal(2, 3, 64, seed=2).bfloat16()
    labels = torch.zeros(2, 3, dtype=torch.long)
    got = distillation_losses(student, teacher, labels)
    kd, ce = oracle(student.double(), teacher.double(), labels, 1.0, 64)
    assert got.kd.dtype == torch.float32
    torch.testing.assert_close(got.kd.double(), kd, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.ce.double(), ce, rtol=1e-5, atol=1e-5)
    got.total.sum().backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def test_large_logits_do_not_overflow() -> None:
    student, teacher = (1e4 * normal(1, 4, 8, seed=seed).float() for seed in (1, 2))
    got = distillation_losses(student, teacher, torch.zeros(1, 4, dtype=torch.long))
    assert torch.isfinite(got.total).all()


def test_a_model_has_nothing_to_learn_from_itself() -> None:
    student = normal(2, 6, 50, seed=1).float().requires_grad_()
    got = distillation_losses(student, student.detach().clone(), torch.zeros(2, 6, dtype=torch.long))
    got.total.sum().backward()
    assert student.grad is not None
    assert got.kd.abs().max() < 1e-6
    assert student.grad.abs().max() < 1e-6
