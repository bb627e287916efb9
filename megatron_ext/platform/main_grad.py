"""Gradients of weights where Megatron adds them up: `weight.main_grad`, in fp32 over all micro-batches of a step.

Megatron's data parallelism learns that a gradient is there already (`grad_added_to_main_grad`) in a hook that runs when
one arrives; what arrives then is one without entries.
"""

import torch
from torch import Tensor

BLOCK = 2**18
"""Numbers of a 16-bit gradient that are widened at a time, to be added while they are in a core's cache."""


def main_grad(weight: Tensor) -> Tensor | None:
    """Where Megatron adds up a weight's gradients; None where it does not, or has none."""
    return getattr(weight, "main_grad", None) if weight.requires_grad else None


def add_to_main_grad(weight: Tensor, grad: Tensor | None) -> Tensor:
    """What a backward pass gives back for a weight: its gradient, or, where Megatron keeps one, nothing more.

    Args:
        weight: The weight.
        grad: Its gradient, in any type; None if it is in `main_grad` already.

    Returns:
        The gradient, or what arrives in its place when it is in `main_grad`: it has no entries, and so no size.
    """
    main = main_grad(weight)
    if main is None and grad is not None:
        return grad.to(weight.dtype)
    if main is not None and grad is not None:
        add(main, grad)
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device, layout=torch.sparse_coo)


def add(total: Tensor, grad: Tensor) -> None:
    """`total += grad`, of another type without a widened copy of it on a CPU; `total` is contiguous."""
    if total.dtype == grad.dtype or grad.device.type != "cpu":
        total.add_(grad)
        return
    for own, more in zip(total.view(-1).split(BLOCK), grad.reshape(-1).split(BLOCK), strict=True):
        own.add_(more)
