"""The likeliest entries of logits that are never held, against the plain ones in float64."""

import pytest
import torch

from megatron_ext.lm_head import log_probabilities as chunks
from megatron_ext.lm_head import naive
from megatron_ext.lm_head.losses import LMHead
from megatron_ext.lm_head.top_k import teacher_top_k
from megatron_ext.lm_head.vocab_parallel import VocabParallel

S, B, H, COLUMNS, TOKENS = 5, 2, 6, 16, 13


def heads() -> LMHead:
    generator = torch.Generator().manual_seed(3)
    return LMHead(torch.randn(S, B, H, generator=generator), torch.randn(COLUMNS, H, generator=generator))


@pytest.mark.parametrize("k", [1, 4, TOKENS])
@pytest.mark.parametrize("chunk", [1, 3 * COLUMNS])
def test_agrees_with_float64(monkeypatch: pytest.MonkeyPatch, k: int, chunk: int) -> None:
    """Whatever the chunks, and without the padding of the vocabulary."""
    monkeypatch.setattr(chunks, "CHUNK", {"cpu": 4 * chunk})
    monkeypatch.setattr(chunks, "SLICE", {"cpu": 2 * COLUMNS})
    teacher = heads()
    got = teacher_top_k(teacher, VocabParallel(COLUMNS, TOKENS), k, temperature=1.5)
    logits = (teacher.hidden.flatten(0, 1).double() @ teacher.weight.double().T)[:, :TOKENS]
    expected = naive.top_k(logits / 1.5, k)
    assert got.kept.index.equal(expected.index)
    torch.testing.assert_close(got.kept.log_q.double(), expected.log_q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.kept.log_rest.double(), expected.log_rest, rtol=1e-5, atol=1e-6)
    assert got.finite.all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_says_which_logits_are_not_finite(value: float) -> None:
    teacher = heads()
    teacher.hidden[3, 1, 0] = value
    finite = teacher_top_k(teacher, VocabParallel(COLUMNS, TOKENS), 4, 1.0).finite.view(S, B)
    assert not finite[3, 1]
    assert finite.sum() == S * B - 1
