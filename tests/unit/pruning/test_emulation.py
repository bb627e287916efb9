"""Linear emulations against plain least squares, a search over all maps of a rank, and the laws of their figures."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ext.pruning.emulation import Emulator, Moments, fit

D, N = 12, 400


@pytest.fixture(scope="module")
def tokens() -> tuple[Tensor, Tensor]:
    """A correlated stream, and an update that is partly linear in it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64) @ torch.randn(D, D, generator=generator).double()
    f = (x @ torch.randn(D, D, generator=generator).double()).tanh() + 0.1 * x + 2
    return x + 1, f


def seen(x: Tensor, f: Tensor, second: bool = True, parts: int = 3) -> Moments:
    moments = Moments(D, second)
    for some in zip(x.chunk(parts), f.chunk(parts), strict=True):
        moments.add(*some)
    return moments


def error(emulator: Emulator, x: Tensor, f: Tensor) -> float:
    return float((f - emulator(x)).square().sum(1).mean())


def test_a_bias_is_the_mean(tokens: tuple[Tensor, Tensor]) -> None:
    x, f = tokens
    found = fit(seen(x, f, second=False), 0, 0.0)
    np.testing.assert_allclose(found.bias.numpy(), f.numpy().mean(0), rtol=1e-6)
    assert found.mean == pytest.approx(float(f.mean(0).square().sum() / f.square().sum(1).mean()))
    assert found.size == pytest.approx(float(f.norm() / x.norm()))
    assert found.down is None
    assert len(found.explained) == 0


def test_the_full_rank_is_least_squares(tokens: tuple[Tensor, Tensor]) -> None:
    """That of numpy, with a column of ones."""
    x, f = tokens
    found = fit(seen(x, f), D, 0.0)
    solution, residual, *_ = np.linalg.lstsq(np.hstack([x.numpy(), np.ones((N, 1))]), f.numpy(), rcond=None)
    assert found.up is not None
    assert found.down is not None
    np.testing.assert_allclose((found.up @ found.down).T.numpy(), solution[:-1], rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(found.bias.numpy(), solution[-1], rtol=2e-4, atol=1e-5)
    assert error(found, x, f) == pytest.approx(residual.sum() / N, rel=1e-5)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_no_map_of_a_rank_does_better(tokens: tuple[Tensor, Tensor], ridge: float) -> None:
    """It is the truncated SVD of W S^1/2 times S^-1/2 (numpy), better than the truncated W and than what is near it."""
    x, f = (tensor.numpy() for tensor in tokens)
    x, f, rank = x - x.mean(0), f - f.mean(0), 3
    penalty = ridge * np.sort(x.var(0))[(D - 1) // 2]  # torch's median is the lower one
    s = x.T @ x / N + penalty * np.eye(D)

    def loss(matrix: np.ndarray) -> float:
        return float(np.square(f - x @ matrix.T).sum(1).mean() + penalty * np.square(matrix).sum())

    values, vectors = np.linalg.eigh(s)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    whole = f.T @ x / N @ inverse @ inverse
    u, sizes, v = np.linalg.svd(whole @ root)
    best = (u[:, :rank] * sizes[:rank]) @ v[:rank] @ inverse
    found = fit(seen(*tokens), rank, ridge)
    assert found.up is not None
    assert found.down is not None
    matrix = (found.up @ found.down).double().numpy()
    np.testing.assert_allclose(matrix, best, rtol=0, atol=2e-6 * np.abs(best).max())
    u, sizes, v = np.linalg.svd(whole)
    assert loss(matrix) < loss((u[:, :rank] * sizes[:rank]) @ v[:rank]) - 1e-3
    up, down, noise = found.up.double().numpy(), found.down.double().numpy(), np.random.default_rng(0)
    for _ in range(20):
        near = [part + 1e-2 * noise.standard_normal(part.shape) * np.abs(part).mean() for part in (up, down)]
        assert loss(matrix) < loss(near[0] @ near[1])


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_what_is_explained_is_what_is_left_of_the_error(tokens: tuple[Tensor, Tensor], ridge: float) -> None:
    """By each rank, more with each, and never less than nothing; a bias leaves the variance."""
    x, f = tokens
    moments = seen(x, f)
    variance = float((f - f.mean(0)).square().sum(1).mean())
    explained = fit(moments, 1, ridge).explained
    assert explained.shape == (D + 1,)
    assert (explained.diff() >= 0).all()
    assert float(explained[0]) == 0.0
    for rank in range(D + 1):
        found = fit(moments, rank, ridge)
        assert error(found, x, f) == pytest.approx((1 - float(explained[rank])) * variance, rel=1e-4)
        assert error(found, x, f) <= variance * (1 + 1e-6) <= float(f.square().sum(1).mean())
        torch.testing.assert_close(found.explained, explained)


def test_fewer_tokens_than_channels_are_fitted_too() -> None:
    """The regression has no one solution then; the smallest is taken, and channels that are always zero do no harm."""
    generator = torch.Generator().manual_seed(5)
    x, f = torch.randn(6, D, generator=generator).double(), torch.randn(6, D, generator=generator).double()
    x[:, 3] = 0
    found = fit(seen(x, f), D, 0.0)
    assert error(found, x, f) == pytest.approx(0, abs=1e-8)
    nothing = fit(seen(torch.zeros(6, D), torch.zeros(6, D)), 2, 1e-4)
    assert all(bool(part.isfinite().all()) for part in (nothing.bias, nothing.down, nothing.up, nothing.explained))


def test_more_rank_is_the_same_function(tokens: tuple[Tensor, Tensor]) -> None:
    x, f = tokens
    for rank in (0, 2):
        found = fit(seen(x, f), rank, 0.0)
        wider = found.of_rank(5)
        assert wider.down is not None
        assert wider.down.shape == (5, D)
        torch.testing.assert_close(wider(x.float()), found(x.float()))
