"""The Triton convolution, norm and mixer against their definitions in float64, under the interpreter or on a GPU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ssm_oracle import assert_agree
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.ssm import mamba_ssm_api, naive
from megatron_ext.ssm.dispatch import set_backend
from megatron_ext.ssm.triton import conv, norm
from megatron_ext.ssm.triton.mixer import conv_scan_gate

pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outcomes(f: Callable, leaves: dict[str, Tensor | None], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """What f returns, one or two tensors, and the gradients of a fixed random functional of them, by name."""
    own = {name: t if t is None else t.to(device, dtype).requires_grad_() for name, t in leaves.items()}
    found = f(**own)
    found = found if isinstance(found, tuple) else (found,)
    loss = sum((t.double().cpu() * normal(*t.shape, seed=7 + i)).sum() for i, t in enumerate(found))
    present = {name: t for name, t in own.items() if t is not None}
    gradients = torch.autograd.grad(loss, list(present.values()))
    names = [*range(len(found)), *(f"d{name}" for name in present)]
    return {str(name): t.detach().cpu() for name, t in zip(names, (*found, *gradients), strict=True)}


def compare(ours: Callable, definition: Callable, leaves: dict[str, Tensor | None], tolerance: float = 2e-6) -> None:
    assert_agree(
        outcomes(ours, leaves, torch.float32, DEVICE), outcomes(definition, leaves, torch.float64, "cpu"), tolerance
    )


@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 3), (11, 4)])
def test_convolution_with_state(length: int, taps: int) -> None:
    leaves = {"x": normal(2, length, 6), "weight": normal(6, taps), "bias": normal(6, seed=2)}
    leaves["initial_states"] = normal(2, taps - 1, 6, seed=3)
    compare(
        lambda **given: conv.causal_conv1d(**given, activation="silu"),
        lambda **given: naive.causal_conv1d(**given, activation="silu"),
        leaves,
    )


def test_convolution_of_documents() -> None:
    seq_idx = torch.tensor([[0] * 3 + [1] * 5 + [2] + [3] * 2, [0] * 9 + [1] * 2], dtype=torch.int32)
    leaves: dict[str, Tensor | None] = {"x": normal(2, 11, 6), "weight": normal(6, 4, seed=1)}
    compare(
        lambda x, weight: conv.causal_conv1d(x, weight, None, None, seq_idx.to(DEVICE)),
        lambda x, weight: naive.causal_conv1d(x, weight, None, None, seq_idx),
        leaves,
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_norm(gated: bool, before: bool) -> None:
    leaves = {"x": normal(2, 3, 12), "weight": normal(12, seed=1), "z": normal(2, 3, 12, seed=2) if gated else None}
    more = {"eps": 1e-2, "group_size": 6, "norm_before_gate": before}
    compare(
        lambda **given: norm.gated_rms_norm(**given, **more),
        lambda **given: naive.gated_rms_norm(**given, **more),
        leaves,
    )


HEADS, CHANNELS, GROUPS, STATE = 4, 4, 2, 5
INNER, CONV = HEADS * CHANNELS, HEADS * CHANNELS + 2 * GROUPS * STATE


def by_definition(
    zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    initial_states: Tensor | None, seq_idx: Tensor | None, limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    z, xBC, dt = zxbcdt.split([INNER, CONV, HEADS], -1)
    xBC, _ = naive.causal_conv1d(xBC, conv_weight, conv_bias, None, seq_idx, "silu")
    x, B, C = xBC.split([INNER, GROUPS * STATE, GROUPS * STATE], -1)
    x, B, C = x.unflatten(-1, (HEADS, -1)), B.unflatten(-1, (GROUPS, -1)), C.unflatten(-1, (GROUPS, -1))
    steps = F.softplus(dt + dt_bias).clamp(*limit)
    y, final = naive.ssd(x, steps, A, B, C, D, initial_states, seq_idx)
    return y.flatten(2) * F.silu(z), final


def mixer_leaves(length: int, per_channel: bool, initial: bool) -> dict[str, Tensor | None]:
    return {
        "zxbcdt": normal(1, length, INNER + CONV + HEADS),
        "conv_weight": normal(CONV, 4, seed=1),
        "conv_bias": normal(CONV, seed=2),
        "dt_bias": normal(HEADS, seed=3),
        "A": -normal(HEADS, seed=4).exp(),
        "D": normal(HEADS, CHANNELS, seed=5) if per_channel else normal(HEADS, seed=5),
        "initial_states": normal(1, HEADS, CHANNELS, STATE, seed=6) if initial else None,
    }


@pytest.mark.parametrize("packed", [False, True])
def test_mixer(packed: bool) -> None:
    """Convolution, scan and gate from one projection: every gradient, and no trace of one document in another."""
    ends = torch.tensor([[0] * 5 + [1] * 12 + [2] * 2], dtype=torch.int32) if packed else None
    limit = (0.0, float("inf")) if packed else (0.3, 1.2)
    seq_idx = None if ends is None else ends.to(DEVICE)
    compare(
        lambda **given: conv_scan_gate(**given, channels=CHANNELS, groups=GROUPS, seq_idx=seq_idx, dt_limit=limit),
        lambda **given: by_definition(**given, seq_idx=ends, limit=limit),
        mixer_leaves(19, packed, not packed),
        1e-5,
    )


@pytest.mark.parametrize("before", [False, True])
def test_mixer_behind_mamba_ssm(before: bool) -> None:
    """What Megatron calls, with the norm on either side of the gate, is the definition's composition."""
    given = {name: t for name, t in mixer_leaves(9, False, False).items() if t is not None}
    weight = normal(INNER, seed=8)
    set_backend("triton")
    try:
        args = {name: t.to(DEVICE).float() for name, t in given.items()}
        got = mamba_ssm_api.mamba_split_conv1d_scan_combined(
            *args.values(), 256, rmsnorm_weight=weight.to(DEVICE).float(), headdim=CHANNELS, ngroups=GROUPS,
            norm_before_gate=before,
        )  # fmt: skip
    finally:
        set_backend("auto")
    z = given["zxbcdt"][..., :INNER]
    gated, _ = by_definition(**given, initial_states=None, seq_idx=None, limit=(0.0, float("inf")))
    y = gated / F.silu(z) if before else gated
    expected = naive.gated_rms_norm(y, weight, z if before else None, 1e-6, INNER // GROUPS, before)
    assert_agree({"y": got.cpu()}, {"y": expected}, 1e-5)


def test_errors() -> None:
    x = torch.zeros(1, 4, 6)
    with pytest.raises(ConfigError, match="too many taps"):
        conv.causal_conv1d(x, torch.zeros(6, 5))
    with pytest.raises(ConfigError, match="not both"):
        conv.causal_conv1d(x, torch.zeros(6, 4), None, torch.zeros(1, 3, 6), torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ConfigError, match="no such groups"):
        norm.gated_rms_norm(x, torch.zeros(6), group_size=4)
