"""The selective scan in plain torch, with a backward by hand: any device, no compiler.

Rows and tokens are worked on in blocks that fit a core's cache. In a block the decays of all tokens are one exponential
and the drives one product, written where the states will be: then a token is one fused multiply-add in place, and y, dB
and dC are matrix products over the block. Kept for the backward are the inputs and one state a chunk of tokens, from
which each block's states are made again: at n = 8 a quarter of x, where all states would be eight times x.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.errors import ConfigError
from megatron_ext.ops.cache_blocks import blocks
from megatron_ext.ops.ssd.step_sizes import NO_LIMIT, step_sizes

# Tokens in a chunk: one state is kept for each.
CHUNK = 32


def selective_scan(
    x: Float[Tensor, "b l d"],
    dt: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, "d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    dt_bias: Float[Tensor, "d"] | None = None,
    initial_states: Float[Tensor, "b d n"] | None = None,
    dt_softplus: bool = False,
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """The scan of `naive.selective_scan`, differentiable once, accumulated in float32 (float64 for float64 inputs).

    Args:
        x: Inputs.
        dt: Step sizes, to which `dt_bias` is added and, with `dt_softplus`, a softplus applied.
        A: Decay rates, negative.
        B: Input projections, shared by all channels.
        C: Output projections, shared by all channels.
        D: Skip weights.
        z: The gate; None for none.
        dt_bias: Added to the step sizes.
        initial_states: The state before the first token (zero by default).
        dt_softplus: Whether step sizes pass through a softplus.
        chunk_size: Tokens in a chunk. It changes speed and memory, not the result; by default `CHUNK`.

    Returns:
        y in the dtype of x, and the state after the last token in float32 (float64 for float64 inputs).

    Raises:
        ConfigError: The sequence is empty.
    """
    check_length(x)
    steps = step_sizes(dt, dt_bias, dt_softplus, NO_LIMIT)
    y, final = _SelectiveScan.apply(x, steps, A, B, C, initial_states, min(chunk_size or CHUNK, x.shape[1]))  # type: ignore[misc]
    if D is not None:
        y = torch.addcmul(y, D.to(y.dtype), x.to(y.dtype))
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype), final


def check_length(x: Float[Tensor, "b l d"]) -> None:
    """Refuse a sequence without tokens.

    Raises:
        ConfigError: It has none.
    """
    if x.shape[1] == 0:
        raise ConfigError("a selective scan needs at least one token", got=tuple(x.shape))


@dataclass(frozen=True)
class _Block:
    """Some rows and the tokens of a chunk, tokens first: x and dt (t, b, d), B and C (t, b, n), decays (t, b, d, n)."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    decay: Tensor

    @classmethod
    def of(cls, inputs: tuple[Tensor, ...], A: Float[Tensor, "d n"], rows: slice, tokens: slice) -> "_Block":
        x, dt, B, C = (t[rows, tokens].transpose(0, 1).to(A.dtype) for t in inputs)
        return cls(x, dt, B, C, torch.exp_(dt.unsqueeze(-1) * A))

    def states(self, before: Float[Tensor, "b d n"]) -> Float[Tensor, "t b d n"]:
        """The state after each token."""
        states = (self.dt * self.x).unsqueeze(-1) * self.B.unsqueeze(2)
        for state, decay in zip(states.unbind(), self.decay.unbind(), strict=True):
            before = state.addcmul_(decay, before)
        return states

    def gradients(
        self, dy: Float[Tensor, "t b d"], before: Float[Tensor, "b d n"], carried: Float[Tensor, "b d n"], A: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of x, dt, B and C, as they lie here, and of A; `carried`, what later tokens owe to the last state, moves on.

        Args:
            dy: Gradient of y.
            before: The state before the first token.
            carried: In: the gradient of the state after the last token. Out: of that before the first one.
            A: Decay rates.
        """
        states = self.states(before)
        dC = torch.matmul(dy.unsqueeze(2), states).squeeze(2)
        dstates = dy.unsqueeze(-1) * self.C.unsqueeze(2)
        later = carried
        for dstate, decay in zip(reversed(dstates.unbind()), reversed(self.decay.unbind()), strict=True):
            torch.mul(dstate.add_(later), decay, out=carried)
            later = carried
        driven = self.dt * self.x
        dB = torch.matmul(driven.unsqueeze(2), dstates).squeeze(2)
        ddriven = torch.matmul(dstates, self.B.unsqueeze(-1)).squeeze(-1)
        dlog = dstates.mul_(self.decay)  # of the exponent of each decay
        dlog[1:].mul_(states[:-1])
        dlog[0].mul_(before)
        ones = A.new_ones(A.shape[1])
        ddt = torch.mul(dlog, A, out=states).matmul(ones).addcmul_(ddriven, self.x)
        dA = dlog.mul_(self.dt.unsqueeze(-1)).sum((0, 1))
        return ddriven * self.dt, ddt, dB, dC, dA


def _blocks(x: Float[Tensor, "b l d"], state: int, chunk: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows that go together, and the tokens of each chunk."""
    length = x.shape[1]
    chunks = [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
    for rows in blocks(x.shape[0], chunk * x.shape[2] * state, x.device):
        yield rows, chunks


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, dt, A, B, C, initial, chunk):
        dtype = torch.promote_types(x.dtype, torch.float32)
        batch, length, channels = x.shape
        kind = {"dtype": dtype, "device": x.device}
        rates, y = A.to(dtype), torch.empty(x.shape, **kind)
        borders = torch.empty(batch, -(-length // chunk) + 1, channels, A.shape[1], **kind)
        borders[:, 0] = 0 if initial is None else initial
        for rows, chunks in _blocks(x, A.shape[1], chunk):
            for index, tokens in enumerate(chunks):
                block = _Block.of((x, dt, B, C), rates, rows, tokens)
                states = block.states(borders[rows, index])
                y[rows, tokens] = torch.matmul(states, block.C.unsqueeze(-1)).squeeze(-1).transpose(0, 1)
                borders[rows, index + 1] = states[-1]
        ctx.save_for_backward(x, dt, A, B, C, borders)
        ctx.chunk, ctx.has_initial = chunk, initial is not None
        ctx.set_materialize_grads(False)
        return y, borders[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dfinal):  # type: ignore[override]
        x, dt, A, B, C, borders = ctx.saved_tensors
        rates = A.to(borders.dtype)
        dy = torch.zeros(x.shape, dtype=borders.dtype, device=x.device) if dy is None else dy
        found = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        dA = torch.zeros_like(rates)
        carried = torch.zeros_like(borders[:, 0]) if dfinal is None else dfinal.clone()
        for rows, chunks in _blocks(x, A.shape[1], ctx.chunk):
            for index, tokens in reversed(list(enumerate(chunks))):
                block = _Block.of((x, dt, B, C), rates, rows, tokens)
                dys = dy[rows, tokens].transpose(0, 1)
                *own, of_rates = block.gradients(dys, borders[rows, index], carried[rows], rates)
                for whole, part in zip(found, own, strict=True):
                    whole[rows, tokens] = part.transpose(0, 1)
                dA += of_rates
        dx, ddt, dB, dC = found
        return dx, ddt, dA.to(A.dtype), dB, dC, carried if ctx.has_initial else None, None
