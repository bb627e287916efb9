"""The likeliest entries of logits that are never held, against the plain ones in float64."""

import pytest
import torch

from megatron_ext.lm_head import top_k as module
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
    monkeypatch.setattr(module, "CHUNK", {"cpu": 4 * chunk})
    monkeypatch.setattr(module, "SLICE", {"cpu": 2 * COLUMNS})
    teacher = heads()
    got = teacher_top_k(teacher, VocabParallel(COLUMNS, TOKENS), k, temperature=1.5)
    log = (teacher.hidden.flatten(0, 1).double() @ teacher.weight.double().T)[:, :TOKENS].div(1.5).log_softmax(-1)
    log_q, index = log.sort(dim=-1, descending=True)
    assert got.kept.index.equal(index[:, :k])
    torch.testing.assert_close(got.kept.log_q.double(), log_q[:, :k], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.kept.log_rest.double(), log_q[:, k:].logsumexp(-1), rtol=1e-5, atol=1e-6)
    assert got.finite.all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_says_which_logits_are_not_finite(value: float) -> None:
    teacher = heads()
    teacher.hidden[3, 1, 0] = value
    finite = teacher_top_k(teacher, VocabParallel(COLUMNS, TOKENS), 4, 1.0).finite.view(S, B)
    assert not finite[3, 1]
    assert finite.sum() == S * B - 1
