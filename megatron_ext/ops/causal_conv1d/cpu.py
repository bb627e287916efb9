"""The short causal convolution before the scan: each channel by itself, in channels-last layout, backward by hand.

It works in blocks of tokens that fit the cache and keeps nothing but its inputs: what the activation is taken of is
computed again in the backward.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.errors import ConfigError
from megatron_ext.ops.cache_blocks import blocks
from megatron_ext.ops.silu import is_silu

ALL_ROWS = slice(None)


def causal_conv1d(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None = None,
    initial_states: Float[Tensor, "b w-1 d"] | None = None,
    seq_idx: Int[Tensor, "b l"] | None = None,
    activation: str | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b w-1 d"]]:
    """y_t = act(bias + sum_j weight[:, w-1-j] x_{t-j}), accumulated in float32 (float64 for float64 inputs).

    Args:
        x: Inputs.
        weight: The taps; the last one meets the token itself.
        bias: Added before the activation.
        initial_states: The w - 1 inputs before the first token (zero by default).
        seq_idx: Document number of each token; taps do not reach into another document.
        activation: None, "silu" or "swish".

    Returns:
        y in the dtype of x, and the last w - 1 inputs.

    Raises:
        ConfigError: Another activation, or initial states together with documents.
    """
    silu = is_silu(activation)
    if initial_states is not None and seq_idx is not None:
        raise ConfigError("a causal convolution takes initial states or packed documents, not both")
    length, taps = x.shape[1], weight.shape[1]
    past = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if initial_states is None else initial_states.to(x.dtype)
    same = None if seq_idx is None else same_document(seq_idx, taps)
    y = _CausalConv.apply(x, past, weight, bias, same, silu)
    tail = torch.cat([past, x[:, max(0, length - taps + 1) :]], 1)
    return y, tail[:, tail.shape[1] - taps + 1 :]  # type: ignore[return-value]


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, past, weight, bias, same, silu):
        ctx.save_for_backward(x, past, weight, bias, same)
        ctx.silu = silu
        y, taps = torch.empty(x.shape, dtype=x.dtype, device=x.device), Taps.of(weight, bias, accumulation_dtype(x))
        for block in blocks(x.shape[1], x.shape[0] * x.shape[2], x.device):
            z = taps.pre_activation(shifted_inputs(x, past, weight.shape[1], block, block_mask(same, ALL_ROWS, block)))
            y[:, block] = F.silu(z, inplace=True) if silu else z
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[override]
        x, past, weight, bias, same = ctx.saved_tensors
        taps, grads = Taps.of(weight, bias, accumulation_dtype(x)), ConvGradAccumulator(weight, x)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        for block in reversed(list(blocks(x.shape[1], x.shape[0] * x.shape[2], x.device))):
            mask = block_mask(same, ALL_ROWS, block)
            inputs = shifted_inputs(x, past, weight.shape[1], block, mask)
            dz = dy[:, block].to(inputs[0].dtype)
            if ctx.silu:
                dz = torch.ops.aten.silu_backward(dz, taps.pre_activation(inputs))
            dx[:, block] = grads.add(inputs, dz, taps, mask, ALL_ROWS)
        dbias = None if bias is None else grads.bias.to(bias.dtype)
        return dx, grads.past.to(x.dtype), grads.weight.T.to(weight.dtype), dbias, None, None


def block_mask(same: Bool[Tensor, "b w l 1"] | None, rows: slice, tokens: slice) -> Bool[Tensor, "k w block 1"] | None:
    """The part of `same_document` for some rows and tokens."""
    return None if same is None else same[rows, :, tokens]


def shifted_inputs(
    x: Float[Tensor, "b l d"],
    past: Float[Tensor, "b k d"] | None,
    taps: int,
    block: slice,
    same: Bool[Tensor, "b w block 1"] | None,
) -> list[Float[Tensor, "b _ d"]]:
    """The inputs of a block shifted for each tap, in float32 or wider: views where nothing has to be put together.

    They belong to the last tokens of the block: without a past those of the first tap are taps - 1 tokens less.
    """
    reach, length = taps - 1, block.stop - block.start
    first = max(0, block.start - reach)
    inputs, missing = x[:, first : block.stop].to(accumulation_dtype(x)), reach - (block.start - first)
    if missing and past is not None:
        inputs, missing = torch.cat([past[:, reach - missing :].to(inputs.dtype), inputs], 1), 0
    views = [inputs[:, max(0, k - missing) : max(0, k - missing + length)] for k in range(taps)]
    return views if same is None else [t * same[:, k, length - t.shape[1] :] for k, t in enumerate(views)]


class Taps(NamedTuple):
    """The taps and the bias, in the dtype that sums are taken in."""

    rows: tuple[Float[Tensor, "d"], ...]
    bias: Float[Tensor, "d"] | Float[Tensor, ""]

    @staticmethod
    def of(weight: Float[Tensor, "d w"], bias: Float[Tensor, "d"] | None, dtype: torch.dtype) -> "Taps":
        """Those of a layer."""
        rows = weight.T.to(dtype).contiguous().unbind(0)
        return Taps(rows, torch.zeros_like(rows[0]) if bias is None else bias.to(dtype))

    def pre_activation(self, inputs: list[Float[Tensor, "b _ d"]]) -> Float[Tensor, "b block d"]:
        """The bias plus the shifted inputs times their taps, for a block of tokens."""
        z = torch.addcmul(self.bias, inputs[-1], self.rows[-1])
        for t, row in zip(inputs[:-1], self.rows[:-1], strict=True):
            _last(z, t.shape[1]).addcmul_(t, row)
        return z


def _last(t: Float[Tensor, "b block d"], count: int) -> Float[Tensor, "b count d"]:
    return t if count == t.shape[1] else t[:, t.shape[1] - count :]


class ConvGradAccumulator:
    """Gradients that the backward adds up over blocks of tokens, taken from the last to the first.

    Attributes:
        weight: Gradient of the taps (w, d).
        bias: Gradient of the bias (d).
        past: Gradient of the w - 1 inputs before the block at hand (b, w - 1, d), in the end of those before the row.
    """

    def __init__(self, weight: Float[Tensor, "d w"], x: Float[Tensor, "b l d"]) -> None:
        dtype = accumulation_dtype(x)
        self.weight = torch.zeros_like(weight.T, dtype=dtype, memory_format=torch.contiguous_format)
        self.bias = torch.zeros_like(self.weight[0])
        self.past = torch.zeros(x.shape[0], weight.shape[1] - 1, x.shape[2], dtype=dtype, device=x.device)

    def add(
        self,
        inputs: list[Float[Tensor, "b _ d"]],
        dz: Float[Tensor, "b block d"],
        taps: Taps,
        same: Bool[Tensor, "b w block 1"] | None,
        rows: slice,
    ) -> Float[Tensor, "b block d"]:
        """Add a block of `rows`, given its gradient before the activation; return that of its inputs, now complete."""
        past, (b, length, d) = self.past[rows], dz.shape
        reach = past.shape[1]
        dwindow = dz.new_empty(b, reach + length, d)
        taken = [dz] * len(inputs) if same is None else (dz.unsqueeze(1) * same).unbind(1)
        reached = (dwindow[:, k : k + length] for k in range(reach + 1))
        *others, last = zip(reached, taken, taps.rows, strict=True)
        torch.mul(last[1], last[2], out=last[0])
        dwindow[:, :reach].zero_()
        dwindow[:, length:].add_(past)
        for dinputs, dtaken, row in others:
            dinputs.addcmul_(dtaken, row)
        product = torch.empty_like(dz)
        for t, dweight in zip(inputs, self.weight.unbind(0), strict=True):
            dz_of_tap = _last(dz, t.shape[1])
            dweight.add_(torch.mul(t, dz_of_tap, out=_last(product, t.shape[1])).sum((0, 1)))
        self.bias.add_(dz.sum((0, 1)))
        past.copy_(dwindow[:, :reach])
        return dwindow[:, reach:]


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """What sums are taken in: float32, or float64 for float64."""
    return torch.promote_types(t.dtype, torch.float32)


def same_document(seq_idx: Int[Tensor, "b l"], taps: int) -> Bool[Tensor, "b w l 1"]:
    """Whether the token that tap k meets belongs to the same document as the token of the output."""
    reach = [min(taps - 1 - k, seq_idx.shape[1]) for k in range(taps)]
    same = [F.pad(seq_idx[:, j:] == seq_idx[:, : seq_idx.shape[1] - j], (j, 0)) for j in reach]
    return torch.stack(same, 1).unsqueeze(-1)
