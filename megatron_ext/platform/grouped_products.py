"""The products of all experts of a layer as one operation, where each of them is too small to fill a GPU.

Shapes: t tokens of all experts, expert after expert; i features in, o features out, e experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALL = 1e10
"""Operations of one expert's product up to which the host takes longer to launch it than a GPU to compute it, some 15
microseconds. Not measured."""
FAST = (9, 10)
"""Compute capabilities for which torch 2.11 has one kernel; on others it goes through the groups one by one itself."""


def together(x: Tensor, weights: list[Tensor]) -> bool:
    """Whether the experts' products are better one operation here."""
    o, i = weights[0].shape
    fits = x.device.type == "cuda" and x.dtype == weights[0].dtype == torch.bfloat16 and i % 8 == 0 == o % 8
    if not fits or len(weights) == 1 or 2 * len(x) * o * i > SMALL * len(weights):
        return False
    return torch.cuda.get_device_capability(x.device)[0] in FAST


def grouped_products(x: Tensor, splits: list[int], weights: list[Tensor]) -> Tensor:
    """Each expert's x (splits[j], i) times its weight (o, i) transposed, one below the other: (t, o)."""
    return _Products.apply(x, splits, *weights)  # type: ignore[return-value]


class _Products(torch.autograd.Function):
    """Weights are put side by side for each of both passes, and not kept so: they would take their memory twice."""

    @staticmethod
    def forward(ctx: Any, x, splits, *weights):
        ends = torch.tensor(splits).cumsum(0, dtype=torch.int32)
        if x.device.type == "cuda":  # without waiting for the GPU
            ends = ends.pin_memory().to(x.device, non_blocking=True)
        ctx.save_for_backward(x, ends, *weights)
        ctx.splits = splits
        return F.grouped_mm(x, torch.stack(weights).mT, offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # type: ignore[override]
        x, ends, *weights = ctx.saved_tensors
        dout = dout.contiguous()
        dx = F.grouped_mm(dout, torch.stack(weights), offs=ends) if ctx.needs_input_grad[0] else None
        # One by one: together they would need every expert's tokens to be a multiple of eight.
        pairs = zip(dout.split(ctx.splits), x.split(ctx.splits), strict=True)
        return dx, None, *(own.T @ tokens for own, tokens in pairs)
