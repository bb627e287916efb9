"""Inputs of all between a Mamba-2 layer's two projections, and results with every gradient, to compare in float64."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from ssm_oracle import assert_agree
from torch import Tensor

from megatron_ext.ops.mamba_mixer.projection import Projection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of a Triton kernel
HEADS, CHANNELS, GROUPS, STATE = 4, 4, 2, 5
PROJECTION = Projection(HEADS, CHANNELS, GROUPS)
INNER, CONV = HEADS * CHANNELS, HEADS * CHANNELS + 2 * GROUPS * STATE


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outcomes(f: Callable, leaves: Mapping[str, Tensor | None], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """What f returns, one or two tensors, and the gradients of a fixed random functional of them, by name.

    The functional's weights are bfloat16 numbers, so that they are the same in every dtype.
    """
    own = {name: t if t is None else t.to(device, dtype).requires_grad_() for name, t in leaves.items()}
    found = f(**own)
    found = found if isinstance(found, tuple) else (found,)
    loss: Any = sum((t.double().cpu() * normal(*t.shape, seed=7 + i).bfloat16()).sum() for i, t in enumerate(found))
    present = {name: t for name, t in own.items() if t is not None}
    gradients = torch.autograd.grad(loss, list(present.values()), allow_unused=True, materialize_grads=True)
    names = [*range(len(found)), *(f"d{name}" for name in present)]
    return {str(name): t.detach().cpu() for name, t in zip(names, (*found, *gradients), strict=True)}


def compare(ours: Callable, definition: Callable, leaves: Mapping[str, Tensor | None], tolerance: float = 2e-6) -> None:
    """Hold results and gradients in float32 on `DEVICE` against those of a definition in float64."""
    assert_agree(
        outcomes(ours, leaves, torch.float32, DEVICE), outcomes(definition, leaves, torch.float64, "cpu"), tolerance
    )


def leaves(
    length: int,
    *,
    batch: int = 1,
    per_channel: bool = False,
    initial: bool = False,
    normed: bool = False,
    biased: bool = True,
) -> dict[str, Any]:
    """The differentiable arguments of `conv_scan_norm`, by name."""
    return {
        "zxbcdt": normal(batch, length, INNER + CONV + HEADS),
        "conv_weight": normal(CONV, 4, seed=1),
        "conv_bias": normal(CONV, seed=2) if biased else None,
        "dt_bias": normal(HEADS, seed=3),
        "A": -normal(HEADS, seed=4).exp(),
        "D": normal(HEADS, CHANNELS, seed=5) if per_channel else normal(HEADS, seed=5),
        "initial_states": normal(batch, HEADS, CHANNELS, STATE, seed=6) if initial else None,
        "norm_weight": normal(INNER, seed=8) if normed else None,
    }
