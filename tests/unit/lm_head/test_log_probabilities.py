"""Log-probabilities of tokens from logits that are never held, against the plain ones in float64."""

import pytest
import torch

from megatron_ext.lm_head import log_probabilities as module
from megatron_ext.lm_head import naive
from megatron_ext.lm_head.log_probabilities import log_probabilities
from megatron_ext.lm_head.losses import LMHead
from megatron_ext.lm_head.vocab_parallel import VocabParallel

COLUMNS, TOKENS = 16, 13


@pytest.mark.parametrize("n", [0, 1, 7, 40])
@pytest.mark.parametrize("chunk", [1, 3])
def test_agree_with_float64(monkeypatch: pytest.MonkeyPatch, n: int, chunk: int) -> None:
    """Whatever the chunks, and without the padding of the vocabulary."""
    monkeypatch.setattr(module, "CHUNK", {"cpu": 4 * chunk * COLUMNS})
    monkeypatch.setattr(module, "SLICE", {"cpu": 2 * COLUMNS})
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(n, 6, generator=generator), torch.randn(COLUMNS, 6, generator=generator)
    weight[TOKENS:] *= 10  # padding would win
    labels = torch.randint(TOKENS, (n,), generator=generator)
    expected = naive.log_probabilities((hidden.double() @ weight.double().T)[:, :TOKENS], labels)
    got = log_probabilities(LMHead(hidden, weight), labels, VocabParallel(COLUMNS, TOKENS))
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_first_of_equally_probable_tokens_is_the_most_probable() -> None:
    labels = torch.arange(4)
    got = log_probabilities(LMHead(torch.zeros(4, 6), torch.zeros(4, 6)), labels, VocabParallel(4, 4))
    assert got[1].tolist() == [1, 0, 0, 0]
