"""The gated norm against its definition and against transformers."""

import pytest
import torch
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from megatron_ext.ops.cache_blocks import BLOCK_ELEMENTS
from megatron_ext.ops.gated_norm import cpu, naive
from megatron_ext.ops.mamba_ssm_api import RMSNorm


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("group_size", [None, 4, 6])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_agrees_with_the_definition(
    monkeypatch: pytest.MonkeyPatch, group_size: int | None, norm_before_gate: bool, gated: bool
) -> None:
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", 4 * 12)  # blocks of 4 tokens and then 2
    leaves = [normal(2, 3, 12), normal(12, seed=1)] + ([normal(2, 3, 12, seed=2)] if gated else [])
    outcomes = []
    for f in (naive.gated_rms_norm, cpu.gated_rms_norm):
        own = [t.clone().requires_grad_() for t in leaves]
        y = f(*own, eps=1e-2, group_size=group_size, norm_before_gate=norm_before_gate)
        outcomes.append([y, *torch.autograd.grad((y * normal(*y.shape, seed=3)).sum(), own)])
    for right, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, right)


def test_gradcheck() -> None:
    leaves = [t.requires_grad_() for t in (normal(2, 6), normal(6, seed=1), normal(2, 6, seed=2))]
    for before in (False, True):
        torch.autograd.gradcheck(
            lambda *a, before=before: cpu.gated_rms_norm(*a, group_size=3, norm_before_gate=before), leaves
        )


def test_module_agrees_with_transformers() -> None:
    theirs = MambaRMSNormGated(12, group_size=6, eps=1e-4)
    ours = RMSNorm(12, eps=1e-4, group_size=6, norm_before_gate=False, device="cpu", dtype=torch.float32)
    assert [name for name, _ in ours.named_parameters()] == ["weight"]
    torch.nn.init.normal_(theirs.weight, generator=torch.Generator().manual_seed(0))
    ours.load_state_dict(theirs.state_dict())
    x, z = normal(5, 12).float(), normal(5, 12, seed=1).float()
    torch.testing.assert_close(ours(x, z), theirs(x, z))
    torch.testing.assert_close(ours(x), theirs(x))


def test_bfloat16_is_rounded_once() -> None:
    x, weight, z = (t.bfloat16() for t in (normal(8, 64), normal(64, seed=1), normal(8, 64, seed=2)))
    got = cpu.gated_rms_norm(x, weight, z)
    assert got.dtype == torch.bfloat16
    exact = naive.gated_rms_norm(x.double(), weight.double(), z.double())
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)
