import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.inference.sampling import Sampling, choose, distribution


def logits(n: int = 5, v: int = 40) -> torch.Tensor:
    return 3 * torch.randn(n, v, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=7),
        Sampling(temperature=1.3, top_p=0.8),
        Sampling(temperature=1.3, top_k=12, top_p=0.5),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=2.0, top_k=1000),
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(sampling: Sampling) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    expected = TemperatureLogitsWarper(sampling.temperature)(None, logits().double())  # type: ignore[arg-type]
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)  # type: ignore[arg-type]
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)  # type: ignore[arg-type]
    probabilities, order = distribution(logits(), sampling)
    found = torch.zeros(5, 40, dtype=torch.float64).scatter(-1, order, probabilities)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected.softmax(-1))


def test_evenly_spread_draws_give_the_distribution() -> None:
    sampling = Sampling(temperature=1.0, top_k=5)
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = choose(logits(1).expand(20_000, -1), sampling, draws)
    found = torch.bincount(drawn, minlength=40) / 20_000
    probabilities, order = distribution(logits(1), sampling)
    expected = torch.zeros(40).scatter(0, order[0], probabilities[0].float())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_ends_of_the_range_draw_the_first_and_the_last_token_that_may_be() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.6)
    probabilities, order = distribution(logits(1), sampling)
    last = order[0, int((probabilities[0] > 0).sum()) - 1]
    assert int(choose(logits(1), sampling, torch.tensor([0.0], dtype=torch.float64))) == order[0, 0]
    assert int(choose(logits(1), sampling, torch.tensor([1.0], dtype=torch.float64))) == last


def test_temperature_zero_takes_the_largest() -> None:
    assert torch.equal(choose(logits(), Sampling()), logits().argmax(-1))


def test_draws_depend_on_seed_and_request_alone() -> None:
    draws = Sampling(seed=1).draws(4, 10)
    assert torch.equal(draws[:5], Sampling(seed=1).draws(4, 5))
    assert not torch.equal(draws, Sampling(seed=1).draws(5, 10))
    assert not torch.equal(draws, Sampling(seed=2).draws(4, 10))


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}])
def test_wrong_values_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"sampling\n"):
        Sampling(**wrong)  # type: ignore[arg-type]
