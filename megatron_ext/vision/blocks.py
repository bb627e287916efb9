"""Residual blocks of pixels and of tokens, windows, and the norm over a batch.

Pixels are (b, c, h, w), tokens of windows (b windows, l, c), row by row.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from megatron_ext.vision.architecture import KERNEL, MambaVision
from megatron_ext.vision.linears import Linears
from megatron_ext.vision.mixer import Attention, MambaVisionMixer


class DropPath(nn.Module):
    """Leaves out a residual branch for some images, and scales it for the others (arXiv 1603.09382).

    Args:
        rate: The share of images. Windows of one image are left out one by one.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "b *rest"]) -> Float[Tensor, "b *rest"]:
        """x in evaluation; in training zero or x / (1 - rate)."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm in float32, also in a model of 16 bits, over the micro-batches of all data-parallel ranks.

    Attributes:
        group: The ranks whose images are normalised together; None for this process alone.
    """

    group: Any = None

    def _apply(self, fn: Any, recurse: bool = True) -> "BatchNorm":
        super()._apply(fn, recurse)
        for name in ("running_mean", "running_var"):
            statistic = getattr(self, name)
            setattr(self, name, statistic.to(torch.promote_types(statistic.dtype, torch.float32)))
        return self

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:  # type: ignore[override]
        """x, normalised by the batch's statistics in training, else by the running ones."""
        kind = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(kind), self.bias.to(kind)
        group: Any = self.group
        if not self.training or group is None or group.size() == 1:
            if self.training:
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, self.training, 0.1, self.eps)
        own = x.to(kind)
        count = own.numel() / own.shape[1] * group.size()  # every rank's micro-batch is as large
        mean = _Sum.apply(own.sum((0, 2, 3)), group) / count  # type: ignore[operator]
        centred = own - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3)), group) / count  # type: ignore[operator]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            self.running_mean.lerp_(mean, 0.1)  # type: ignore[union-attr]
            self.running_var.lerp_(variance * (count / max(1, count - 1)), 0.1)  # type: ignore[union-attr]
        factor = (variance + self.eps).rsqrt() * weight
        return (centred * factor[:, None, None] + bias[:, None, None]).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over ranks, which all of them use: so the gradient is a sum over ranks, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = dtotal.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def convolution(inputs: int, outputs: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution with as many pixels out as in, or a quarter of them."""
    return nn.Conv2d(inputs, outputs, KERNEL, stride, KERNEL // 2, bias=bias)


class ConvBlock(nn.Module):
    """Two convolutions with their norms, beside the identity.

    Args:
        channels: Of the stage.
        inner: Between the two.
        drop_path: The share of images that skip it.
    """

    def __init__(self, channels: int, inner: int, drop_path: float) -> None:
        super().__init__()
        self.conv1, self.norm1 = convolution(channels, inner, bias=True), BatchNorm(inner)
        self.conv2, self.norm2 = convolution(inner, channels, bias=True), BatchNorm(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """x and what the convolutions add."""
        hidden = F.gelu(self.norm1(self.conv1(x)), approximate="tanh")
        return x + self.drop_path(self.norm2(self.conv2(hidden)))


class TokenBlock(nn.Module):
    """A mixer or attention, then an MLP, each behind a layer norm and beside the identity.

    Args:
        kind: M or S.
        model: The network.
        stage: Counted from 0.
        drop_path: The share of windows that skip each half.
        linears: How linear layers are made.
    """

    def __init__(self, kind: str, model: MambaVision, stage: int, drop_path: float, linears: Linears) -> None:
        super().__init__()
        channels, hidden = model.channels(stage), model.hidden(stage)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mixer = (MambaVisionMixer if kind == "M" else Attention)(model, stage, linears)
        self.fc1, self.fc2 = linears.column(channels, hidden, bias=True), linears.row(hidden, channels, bias=True)
        self.gamma1 = self.gamma2 = None
        if model.layer_scale is not None:
            self.gamma1, self.gamma2 = (nn.Parameter(torch.full((channels,), model.layer_scale)) for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b l c"]:
        """x and what both halves add."""
        mixed = self.mixer(self.norm1(x))
        x = x + self.drop_path(mixed if self.gamma1 is None else mixed * self.gamma1)
        hidden = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + self.drop_path(hidden if self.gamma2 is None else hidden * self.gamma2)


def to_windows(x: Float[Tensor, "b c h w"], side: int) -> Float[Tensor, "windows l c"]:
    """Windows of side x side pixels, row by row; the last ones are filled up with zeros, below and on the right."""
    channels, h, w = x.shape[1:]
    x = F.pad(x, (0, -w % side, 0, -h % side))
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (b, c, rows, side, columns, side)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, side * side, channels)


def from_windows(
    tokens: Float[Tensor, "windows l c"], side: int, height: int, width: int
) -> Float[Tensor, "b c height width"]:
    """The pixels of windows again, without what filled them up; the channels of a pixel lie together, as in a token."""
    rows, columns = -(-height // side), -(-width // side)
    x = tokens.reshape(-1, rows, columns, side, side, tokens.shape[-1])
    x = x.transpose(2, 3).reshape(-1, rows * side, columns * side, tokens.shape[-1])
    return x.permute(0, 3, 1, 2)[:, :, :height, :width]
