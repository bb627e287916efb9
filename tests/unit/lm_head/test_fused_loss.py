"""Where the gradients of the distillation loss go, and how much memory there is of it."""

import pytest
import torch
from peak import PeakMeter
from torch import Tensor

from megatron_ext.lm_head import fused_loss, naive
from megatron_ext.lm_head.losses import LMHead, distillation_losses
from megatron_ext.lm_head.objective import Objective
from megatron_ext.lm_head.vocab_parallel import VocabParallel
from tests.unit.lm_head.test_losses import HIDDEN, data, heads


class Bucket(torch.nn.Parameter):
    """A weight of Megatron's data parallelism: its gradient is collected in fp32."""

    main_grad: Tensor
    grad_added_to_main_grad: bool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_added_to_megatrons(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kept: bool, tied: bool
) -> None:
    """To what earlier micro-batches left there; an embedding that shares the weight adds to it in Megatron's hook."""
    monkeypatch.setattr(fused_loss, "KEPT", {"cpu": 2**20 * kept})
    monkeypatch.setattr(fused_loss, "CHUNK", {"cpu": 3 * 50 * 4})
    student, teacher = heads(16, 50)
    labels, mask = data(16, 50)
    weight = Bucket(student[1].detach().to(dtype))
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(50, HIDDEN), False
    seen: list[Tensor | None] = []
    accumulation = weight.expand_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    accumulation.register_hook(lambda *_: seen.append(weight.grad))
    own = LMHead(student[0].detach().to(dtype).requires_grad_(), weight)
    other = LMHead(*(x.to(dtype) for x in teacher))
    got = distillation_losses(own, other, labels, mask.float(), Objective(ce_weight=0.5), VocabParallel(50, 50))
    used = torch.nn.functional.embedding(labels, weight).float().sum() if tied else 0.0
    (0.25 * got.total + used).backward()
    assert weight.grad_added_to_main_grad
    (arrived,) = seen
    assert arrived is not None
    expected = torch.bincount(labels.flatten(), minlength=50).float() if tied else torch.zeros(50)
    torch.testing.assert_close(arrived.to_dense()[:, 0].float(), expected)
    hidden, rows = (x.detach().to(dtype).double().requires_grad_() for x in student)
    total, *_ = naive.distillation_losses(
        (hidden, rows), (other.hidden.double(), other.weight.double()), labels, mask, Objective(ce_weight=0.5), 50
    )
    (0.25 * total).backward()
    assert rows.grad is not None
    error = (weight.main_grad.double() - 1 - rows.grad).norm() / rows.grad.norm()
    assert error < (1e-6 if dtype == torch.float32 else 5e-3)


def test_nothing_of_the_weights_size_is_held() -> None:
    """128K words: a gradient of the weights would be 263 MB in fp32, the plain method's logits 8 MB of fp32 each."""
    words, hidden = 128_256, 512
    with PeakMeter() as meter:
        weight = Bucket(torch.zeros(words, hidden, dtype=torch.bfloat16))
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(words, hidden), False
        own = LMHead(torch.randn(8, 2, hidden).bfloat16().requires_grad_(), weight)
        other = LMHead(torch.randn(8, 2, hidden).bfloat16(), torch.zeros_like(weight.detach()))
        labels, mask = torch.zeros(8, 2, dtype=torch.long), torch.ones(8, 2)
        before = meter.peak = meter.alive
        losses = distillation_losses(own, other, labels, mask, Objective(ce_weight=1.0), VocabParallel(words, words))
        assert meter.alive - before < 2**20
        losses.total.backward()
    assert weight.main_grad.any()
    assert meter.peak - before < 40 * 2**20


@pytest.mark.gpu
def test_products_of_16_bits_are_added_in_fp32_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(1)
    grad, hidden = (torch.randn(96, n, generator=generator).bfloat16() for n in (64, 32))
    total = torch.ones(64, 32, device="cuda")
    fused_loss._add_product(total, grad.cuda(), hidden.cuda())
    torch.testing.assert_close(total.cpu().double(), 1 + grad.double().T @ hidden.double(), rtol=1e-5, atol=1e-4)


def test_chunks_are_of_whole_tiles_and_cover_all_tokens() -> None:
    """Of 128 tokens on a GPU, within what may be held, and no larger than the batch."""
    gpu, most = torch.device("cuda"), fused_loss.CHUNK["cuda"]
    for n in (1, 100, 128, 8191, 8192, 50_000):
        for held in (1, 90, 127, 128, 300, 1046, 70_000):
            step = fused_loss._tokens_at_a_time(n, most // held, gpu)
            assert 1 <= step <= min(n, held + 1)
            assert step % 128 == 0 or step == n or held < 128
            chunks = -(-n // step)
            assert chunks <= -(-n // max(1, held // 128 * 128 or held))
