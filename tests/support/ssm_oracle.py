"""Inputs of a state-space scan, and its results with every gradient, for comparisons with `naive.ssd` in float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def inputs(
    length: int,
    *,
    batch: int = 2,
    heads: int = 4,
    channels: int = 3,
    groups: int = 2,
    state: int = 5,
    decay: float = 1.0,
    skip_per_channel: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Float64 inputs of a scan, by name. `decay` scales A."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(batch, length, heads, channels),
        "dt": torch.nn.functional.softplus(normal(batch, length, heads)),
        "A": -decay * normal(heads).exp(),
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
        "D": normal(heads, channels) if skip_per_channel else normal(heads),
        "initial_states": normal(batch, heads, channels, state),
    }


def results(
    scan: Callable,
    given: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    narrow: torch.dtype | None = None,
    device: str = "cpu",
    **more: Any,
) -> dict[str, Tensor]:
    """y, the final state and the gradients of a fixed random functional of both, by name, on the CPU.

    `narrow` is the dtype of x, B and C where it is not that of the rest; `given` should then hold values it can hold.
    """
    kinds = {name: narrow or dtype if name in ("x", "B", "C") else dtype for name in given}
    leaves = {name: t.to(device, kinds[name]).requires_grad_() for name, t in given.items()}
    y, final = scan(**leaves, **more)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(device) for t in (y, final)]
    loss: Any = sum((t.double() * w).sum() for t, w in zip((y, final), weights, strict=True))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {"y": y, "final": final, **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}
    return {name: t.detach().cpu() for name, t in found.items()}


def assert_agree(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Largest difference relative to the largest entry, for each result by name."""
    for name, right in expected.items():
        error = (got[name].double() - right.double()).abs().max() / right.double().abs().max().clamp_min(1e-20)
        assert error < tolerance, f"{name}: relative error {error:.2e}"
