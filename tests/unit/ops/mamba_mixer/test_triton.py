"""The Triton mixer against its definition in float64, under the interpreter or on a GPU."""

from functools import partial

import pytest
import torch
from mixer_oracle import CHANNELS, DEVICE, GROUPS, PROJECTION, compare, leaves
from ssm_oracle import assert_agree

from megatron_ext.ops import mamba_ssm_api
from megatron_ext.ops.dispatch import set_backend
from megatron_ext.ops.mamba_mixer import naive
from megatron_ext.ops.mamba_mixer.triton import conv_scan_norm
from megatron_ext.ops.ssd.triton_tiling import ScanTiling

pytestmark = pytest.mark.triton
by_definition = partial(naive.conv_scan_norm, projection=PROJECTION)


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


@pytest.mark.parametrize("normed", [False, True])
def test_tokens_that_come_first_stay_where_they_are(normed: bool) -> None:
    """As Megatron lays out its activations: the same numbers, and neither inputs nor gradients are moved."""
    given = {name: None if t is None else t.to(DEVICE).float() for name, t in leaves(7, batch=2, normed=normed).items()}
    mixer = partial(conv_scan_norm, projection=PROJECTION, norm_before_gate=False)
    found, layouts = [], []
    for first in (False, True):
        own = {name: None if t is None else t.clone().requires_grad_() for name, t in given.items()}
        leaf = own["zxbcdt"]
        assert leaf is not None
        if first:
            leaf = own["zxbcdt"] = leaf.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        y, _ = mixer(**own)
        weight = torch.arange(y.shape[-1], device=y.device, dtype=y.dtype).cos()
        dy = weight.expand(y.shape[1], y.shape[0], -1).contiguous().transpose(0, 1) if first else weight.expand(y.shape)
        gradients = torch.autograd.grad(y, [t for t in own.values() if t is not None], dy)
        found.append([y, *gradients])
        layouts.append([t.transpose(0, 1).is_contiguous() for t in (y, gradients[0])])
    assert layouts == [[False, False], [normed, True]]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_mixer_with_runs_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate in the scan, whose gradients one of two passes over the states makes."""
    monkeypatch.setattr(ScanTiling, "run", lambda self: 1)
    compare(
        partial(conv_scan_norm, projection=PROJECTION, chunk_size=16), by_definition, leaves(39, initial=True), 2e-5
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
            *args.values(),
            chunk_size=256,
            rmsnorm_weight=weight,
            headdim=CHANNELS,
            ngroups=GROUPS,
            norm_before_gate=before,
        )
    finally:
        set_backend("auto")
    assert isinstance(got, torch.Tensor)  # no final states were asked for
    expected, _ = by_definition(**given, initial_states=None, norm_before_gate=before)
    assert_agree({"y": got.cpu()}, {"y": expected}, 1e-5)
