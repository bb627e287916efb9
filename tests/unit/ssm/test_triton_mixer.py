"""The Triton convolution, norm and mixer against their definitions in float64, under the interpreter or on a GPU."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from mixer_oracle import CHANNELS, GROUPS, PROJECTION, by_definition, leaves, normal, outcomes
from ssm_oracle import assert_agree
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.ssm import mamba_ssm_api, naive
from megatron_ext.ssm.dispatch import set_backend
from megatron_ext.ssm.triton import conv, norm
from megatron_ext.ssm.triton.mixer import conv_scan_norm

pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.mark.parametrize("norm", [None, True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_mixer(packed: bool, norm: bool | None) -> None:
    """All from one projection: every gradient, and no trace of one document in another."""
    ends = torch.tensor([[0] * 5 + [1] * 12 + [2] * 2], dtype=torch.int32) if packed else None
    how = {"dt_limit": (0.0, float("inf")) if packed else (0.3, 1.2), "norm_before_gate": bool(norm), "norm_eps": 1e-2}
    seq_idx = None if ends is None else ends.to(DEVICE)
    compare(
        partial(conv_scan_norm, projection=PROJECTION, seq_idx=seq_idx, **how),
        partial(by_definition, seq_idx=ends, **how),
        leaves(19, per_channel=packed, initial=not packed, normed=norm is not None),
        2e-5,
    )


def test_mixer_of_several_rows() -> None:
    """The gate's gradient lies in that of the projection, row after row; and no bias in the convolution."""
    compare(
        partial(conv_scan_norm, projection=PROJECTION, norm_before_gate=False),
        partial(by_definition, norm_before_gate=False),
        leaves(7, batch=2, normed=True, biased=False),
        1e-5,
    )


@pytest.mark.parametrize("before", [False, True])
def test_mixer_behind_mamba_ssm(before: bool) -> None:
    """What Megatron calls, with the norm on either side of the gate, is the definition."""
    given = {name: t for name, t in leaves(9, normed=True).items() if t is not None}
    set_backend("triton")
    try:
        args = {name: t.to(DEVICE).float() for name, t in given.items()}
        weight = args.pop("norm_weight")
        got = mamba_ssm_api.mamba_split_conv1d_scan_combined(
            *args.values(), 256, rmsnorm_weight=weight, headdim=CHANNELS, ngroups=GROUPS, norm_before_gate=before
        )
    finally:
        set_backend("auto")
    expected, _ = by_definition(**given, initial_states=None, norm_before_gate=before)
    assert_agree({"y": got.cpu()}, {"y": expected}, 1e-5)


def test_errors() -> None:
    x = torch.zeros(1, 4, 6)
    with pytest.raises(ConfigError, match="too many taps"):
        conv.causal_conv1d(x, torch.zeros(6, 5))
    with pytest.raises(ConfigError, match="not both"):
        conv.causal_conv1d(x, torch.zeros(6, 4), None, torch.zeros(1, 3, 6), torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ConfigError, match="no such groups"):
        norm.gated_rms_norm(x, torch.zeros(6), group_size=4)
