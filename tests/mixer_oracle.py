"""All between a Mamba-2 layer's two projections by its definition, and inputs for it, for comparisons in float64."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from ssm_oracle import assert_agree
from torch import Tensor

from megatron_ext.ops.causal_conv1d import naive as conv_naive
from megatron_ext.ops.gated_norm import naive as norm_naive
from megatron_ext.ops.mamba_mixer.projection import Projection
from megatron_ext.ops.ssd import naive as ssd_naive

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of a Triton kernel
HEADS, CHANNELS, GROUPS, STATE = 4, 4, 2, 5
PROJECTION = Projection(HEADS, CHANNELS, GROUPS)
INNER, CONV = HEADS * CHANNELS, HEADS * CHANNELS + 2 * GROUPS * STATE


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outcomes(f: Callable, leaves: dict[str, Tensor | None], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """What f returns, one or two tensors, and the gradients of a fixed random functional of them, by name.

    The functional's weights are bfloat16 numbers, so that they are the same in every dtype.
    """
    own = {name: t if t is None else t.to(device, dtype).requires_grad_() for name, t in leaves.items()}
    found = f(**own)
    found = found if isinstance(found, tuple) else (found,)
    loss = sum((t.double().cpu() * normal(*t.shape, seed=7 + i).bfloat16()).sum() for i, t in enumerate(found))
    present = {name: t for name, t in own.items() if t is not None}
    gradients = torch.autograd.grad(loss, list(present.values()), allow_unused=True, materialize_grads=True)
    names = [*range(len(found)), *(f"d{name}" for name in present)]
    return {str(name): t.detach().cpu() for name, t in zip(names, (*found, *gradients), strict=True)}


def compare(ours: Callable, definition: Callable, leaves: dict[str, Tensor | None], tolerance: float = 2e-6) -> None:
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
) -> dict[str, Tensor | None]:
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


def by_definition(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    initial_states: Tensor | None,
    norm_weight: Tensor | None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    activation: str | None = "silu",
    norm_eps: float = 1e-6,
    norm_before_gate: bool = True,
) -> tuple[Tensor, Tensor]:
    """`conv_scan_norm` as one plain formula after the other."""
    z, xBC, dt = zxbcdt.split([INNER, CONV, HEADS], -1)
    xBC, _ = conv_naive.causal_conv1d(xBC, conv_weight, conv_bias, None, seq_idx, activation)
    x, B, C = xBC.split([INNER, GROUPS * STATE, GROUPS * STATE], -1)
    x, B, C = x.unflatten(-1, (HEADS, -1)), B.unflatten(-1, (GROUPS, -1)), C.unflatten(-1, (GROUPS, -1))
    steps = F.softplus(dt + dt_bias).clamp(*dt_limit)
    y, final = ssd_naive.ssd(x, steps, A, B, C, D, initial_states, seq_idx)
    y = y.flatten(2)
    if norm_weight is None:
        return y * F.silu(z), final
    return norm_naive.gated_rms_norm(y, norm_weight, z, norm_eps, INNER // GROUPS, norm_before_gate), final
