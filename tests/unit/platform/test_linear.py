"""The linear layer of a CPU against `torch.nn.functional.linear` in float64, whichever library does the product."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.platform import linear as module
from megatron_ext.platform import main_grad
from megatron_ext.platform.linear import linear, prefers_onednn

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch carries no oneDNN"
)


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "prefers_onednn", lambda: True)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_onednn(y: Tensor) -> bool:
    return y.grad_fn is not None and "_Linear" in y.grad_fn.name()


@needs_onednn
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (64, 800), (800, 64), (770, 770)])
@pytest.mark.parametrize("biased", [False, True])
def test_every_gradient(amd: None, inputs: int, outputs: int, biased: bool) -> None:
    """On both sides of the sizes from which oneDNN also makes the gradient of the weight, either side the longer."""
    leaves = [normal(4, 130, inputs, seed=0), normal(outputs, inputs, seed=1)]
    leaves += [normal(outputs, seed=2)] if biased else []
    for t in leaves:
        t.requires_grad_()
    y = linear(*leaves)
    assert by_onednn(y)
    dy = normal(*y.shape, seed=3)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = F.linear(*wide)
    got, right = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, wide, dy.double())
    for a, b in zip((y, *got), (expected, *right), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 2e-6 * b.abs().max()


@needs_onednn
def test_views_and_frozen_weights(amd: None) -> None:
    """A slice, a transpose and a weight without a gradient."""
    weight = normal(96, 64, seed=1)
    x = normal(300, 2, 80, seed=0).transpose(0, 1)[..., 8:72].requires_grad_()
    y = linear(x, weight)
    assert by_onednn(y)
    dy = normal(96, 2, 300, seed=2).permute(1, 2, 0)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(y, F.linear(x, weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, dy @ weight, rtol=1e-5, atol=1e-5)


def test_small_and_other_numbers_are_torch_s(amd: None) -> None:
    for tokens, inputs, dtype in ((511, 64, torch.float32), (512, 63, torch.float32), (512, 64, torch.float64)):
        x, weight = normal(tokens, inputs, seed=0).to(dtype), normal(64, inputs, seed=1).to(dtype).requires_grad_()
        y = linear(x, weight)
        assert not by_onednn(y)
        assert torch.equal(y, F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=needs_onednn)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_gradient_is_added_to_megatrons(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, onednn: bool, biased: bool
) -> None:
    """To what earlier micro-batches left there, in fp32, in blocks; what arrives is empty."""
    monkeypatch.setattr(module, "prefers_onednn", lambda: onednn)
    monkeypatch.setattr(main_grad, "BLOCK", 1000)
    x, weight = (
        normal(4, 130, 64, seed=0).to(dtype).requires_grad_(),
        torch.nn.Parameter(normal(96, 64, seed=1).to(dtype)),
    )
    bias = normal(96, seed=2).to(dtype).requires_grad_() if biased else None
    kept: Any = weight
    kept.main_grad, kept.grad_added_to_main_grad = torch.ones(96, 64), False
    y = linear(x, weight, bias)
    dy = normal(*y.shape, seed=3).to(dtype)
    y.backward(dy)
    assert kept.grad_added_to_main_grad
    assert weight.grad is not None
    assert weight.grad.to_dense().count_nonzero() == 0
    given = [t.detach().double().requires_grad_() for t in (x, weight, *([bias] if bias is not None else []))]
    right = torch.autograd.grad(F.linear(*given), given, dy.double())
    got = (x.grad, kept.main_grad - 1, *([bias.grad] if bias is not None else []))
    for a, b in zip(got, right, strict=True):
        assert (a.double() - b).abs().max() < (2e-6 if dtype == torch.float32 else 1e-2) * b.abs().max()


@needs_onednn
def test_by_the_maker(tmp_path: Path) -> None:
    """Every process of a machine decides alike."""
    for maker, expected in (("AuthenticAMD", True), ("GenuineIntel", False)):
        processor = tmp_path / maker
        processor.write_text(f"processor : 0\nvendor_id\t: {maker}\n")
        assert prefers_onednn(processor) is expected
    assert not prefers_onednn(tmp_path / "nothing")
