"""Inputs of a selective scan, and its results with every gradient, for comparisons with the naive form in float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PROJECTED = ("x", "dt", "B", "C", "z")  # what a layer has in 16 bits; the rest are parameters


def inputs(
    length: int,
    *,
    batch: int = 2,
    channels: int = 6,
    state: int = 3,
    decay: float = 1.0,
    absent: tuple[str, ...] = (),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Float64 inputs of a scan with `dt_softplus`, by name, without those that are `absent`. `decay` scales A."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sequence, states = (batch, length, channels), (batch, length, state)
    given = {
        "x": normal(*sequence), "dt": normal(*sequence), "A": -decay * normal(channels, state).exp(),
        "B": normal(*states), "C": normal(*states), "D": normal(channels), "z": normal(*sequence),
        "dt_bias": normal(channels), "initial_states": normal(batch, channels, state),
    }  # fmt: skip
    return {name: t for name, t in given.items() if name not in absent}


def results(
    scan: Callable,
    given: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    narrow: torch.dtype | None = None,
    device: str = "cpu",
    dt_softplus: bool = True,
    **more: Any,
) -> dict[str, Tensor]:
    """y, the final state and the gradients of a fixed random functional of both, by name, on the CPU.

    `narrow` is the dtype of what a layer projects where it is not that of its parameters.
    """
    kinds = {name: narrow or dtype if name in PROJECTED else dtype for name in given}
    leaves = {name: t.to(device, kinds[name]).requires_grad_() for name, t in given.items()}
    y, final = scan(**leaves, dt_softplus=dt_softplus, **more)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(device) for t in (y, final)]
    loss: Any = sum((t.double() * w).sum() for t, w in zip((y, final), weights, strict=True))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {"y": y, "final": final, **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}
    return {name: t.detach().cpu() for name, t in found.items()}
