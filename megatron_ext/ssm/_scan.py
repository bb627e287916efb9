"""The chunked scan of one block of chunks, forward and backward: what `chunk.py` and `mixer.py` loop over.

Shapes: b batch, t = c L tokens in c chunks, h = g r heads in g groups, p head channels, n state size. A state is kept
as (g, n, r p): the channels of a group's heads side by side, one wide matrix product instead of r narrow ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_ext.ssm._blocks import blocks, rows_at_once
from megatron_ext.ssm._decay import Decays, decays, fill_tile


@dataclass(frozen=True)
class Scan:
    """The sizes of a scan, and what it accumulates in."""

    batch: int
    length: int
    heads: int
    channels: int
    groups: int
    chunk: int
    dtype: torch.dtype

    @property
    def chunks(self) -> int:
        """Chunks of the sequence; the last one may be short."""
        return -(-self.length // self.chunk)

    def blocks(self, device: torch.device) -> Iterator[tuple[slice, slice, slice]]:
        """Slices of the rows, the chunks and the tokens, in order of time: row by row on a CPU, all on a GPU."""
        rows = rows_at_once(self.batch, device)
        elements = rows * self.heads * self.chunk * max(self.chunk, self.channels)
        for row in range(0, self.batch, rows):
            for chunks in blocks(self.chunks, elements, device):
                stop = min(chunks.stop * self.chunk, self.length)
                yield slice(row, row + rows), chunks, slice(chunks.start * self.chunk, stop)

    def decays(self, dt: Float[Tensor, "b l h"], A: Float[Tensor, "h"], starts: Bool[Tensor, "b l"] | None) -> Decays:
        """The decays of all chunks. dt = 0 after the last token: that leaves the state as it is."""
        pad = self.chunks * self.chunk - self.length
        starts = None if starts is None else F.pad(starts, (0, pad)).unflatten(1, (self.chunks, self.chunk))
        dt = F.pad(dt, (0, 0, 0, pad)).unflatten(1, (self.chunks, self.chunk))
        return decays(dt, A, starts, self.groups, self.channels, self.dtype)

    def states(self, initial: Float[Tensor, "b h p n"] | None, like: Tensor, state: int) -> Tensor:
        """Room for the state before each chunk and after the last, (b, s = c + 1, g, n, rp); the first is filled in."""
        shape = (self.batch, self.chunks + 1, self.groups, state, self.heads // self.groups * self.channels)
        states = torch.empty(shape, dtype=self.dtype, device=like.device)
        states[:, 0] = 0 if initial is None else self.wide(initial)
        return states

    def skip(self, D: Float[Tensor, "h"] | Float[Tensor, "h p"] | None) -> Float[Tensor, "h p"] | None:
        """Skip weights of every channel."""
        if D is None:
            return None
        D = D if D.dim() == 2 else D.unsqueeze(-1).expand(-1, self.channels)
        return D.to(self.dtype).contiguous()

    def wide(self, state: Float[Tensor, "b h p n"]) -> Float[Tensor, "b g n rp"]:
        """A state as it is kept here."""
        return state.reshape(state.shape[0], self.groups, -1, state.shape[-1]).mT

    def narrow(self, state: Float[Tensor, "b g n rp"]) -> Float[Tensor, "b h p n"]:
        """A state as others keep it."""
        return state.mT.reshape(state.shape[0], self.heads, -1, state.shape[2])

    def forward(
        self,
        x: Float[Tensor, "b t h p"],
        B: Float[Tensor, "b t g n"],
        C: Float[Tensor, "b t g n"],
        D: Float[Tensor, "h p"] | None,
        decay: Decays,
        states: Float[Tensor, "b s g n rp"],
        out: Float[Tensor, "b t h p"],
    ) -> None:
        """Write y of a block to `out`, and the states in it and after it behind the one before it in `states`."""
        x, B, C, y = (self._chunked(t) for t in (x, B, C, out))
        B, C = B.transpose(2, 3), C.transpose(2, 3)
        added = B.mT @ self._together(x * decay.to_end.unsqueeze(-1))
        before, *after = states.unbind(1)
        for new, keep, state in zip(added.unbind(1), decay.whole.unbind(1), after, strict=True):
            before = torch.addcmul(new, before, keep, out=state)
        tile = self._tile(decay)
        tile.unflatten(2, (self.groups, -1)).mul_((C @ B.mT).tril_().unsqueeze(3))
        from_start = self._per_group(decay.from_start.unsqueeze(-1))
        torch.mul(self._apart(C @ states[:, :-1]), from_start, out=self._per_group(y))
        y += (tile @ x.transpose(2, 3)).transpose(2, 3)
        if D is not None:
            y.addcmul_(x, D)
        if out.shape[1] % self.chunk:  # y is a padded copy
            out.copy_(y.flatten(1, 2)[:, : out.shape[1]])

    def backward(
        self,
        x: Float[Tensor, "b t h p"],
        B: Float[Tensor, "b t g n"],
        C: Float[Tensor, "b t g n"],
        y: Float[Tensor, "b t h p"],
        dy: Float[Tensor, "b t h p"],
        decay: Decays,
        states: Float[Tensor, "b s g n rp"],
        sums: "Sums",
        rows: slice,
    ) -> tuple[Float[Tensor, "b t conv"], Float[Tensor, "b t h"]]:
        """The gradient of x, B and C side by side, and that of dt, for a block of `rows`.

        The blocks behind it have been taken; what sums over tokens is added to `sums`.
        """
        tokens, state = x.shape[1], B.shape[2] * B.shape[3]
        x, B, C, y, dy = (self._chunked(t) for t in (x, B, C, y, dy))
        B, C = B.transpose(2, 3), C.transpose(2, 3)
        weight = decay.to_end.unsqueeze(-1)
        dyw = self._together(dy * decay.from_start.unsqueeze(-1))
        out = x.new_empty(*x.shape[:3], self.heads * self.channels + 2 * state)
        dx, dB, dC = out.split([self.heads * self.channels, state, state], -1)
        dx = dx.unflatten(-1, (self.heads, -1))
        dB, dC = (t.unflatten(-1, (self.groups, -1)).transpose(2, 3) for t in (dB, dC))

        # between chunks: the recurrence backwards
        dbefore, dafter = C.mT @ dyw, torch.empty_like(states[:, 1:])
        last, *rest = reversed(dafter.unbind(1))
        after = last.copy_(sums.state[rows])
        end = (last * states[:, -1]).sum(2).view(x.shape[0], 1, self.heads, -1).sum(-1)
        into = zip(reversed(dbefore.unbind(1)), reversed(decay.whole.unbind(1)), [*rest, sums.state[rows]], strict=True)
        for new, keep, dstate in into:
            after = torch.addcmul(new, after, keep, out=dstate)

        # within chunks
        tile = self._tile(decay)
        mixing = tile.unflatten(2, (self.groups, -1)) * (C @ B.mT).tril_().unsqueeze(3)
        xh, dyh = x.transpose(2, 3).contiguous(), dy.transpose(2, 3).contiguous()
        torch.mul(self._apart(B @ dafter), self._per_group(weight), out=self._per_group(dx))
        dx += (mixing.flatten(2, 3).mT @ dyh).transpose(2, 3)
        dCB = torch.matmul(dyh, xh.mT, out=mixing.flatten(2, 3)).mul_(tile)
        dCB = dCB.unflatten(2, (self.groups, -1)).sum(3).tril_()
        torch.add(dyw @ states[:, :-1].mT, dCB @ B, out=dC)
        torch.add(self._together(x * weight) @ dafter.mT, dCB.mT @ C, out=dB)

        x_dx = _dot(x, dx)
        if sums.D is not None:
            sums.dD += (x * dy).sum((0, 1, 2))
            y = torch.addcmul(y, x, sums.D, value=-1)
            dx.addcmul_(dy, sums.D)
        ddt = sums.steps(_dot(dy, y), x_dx, end, decay.dt)
        return out.flatten(1, 2)[:, :tokens], ddt[:, :tokens]

    def _chunked(self, t: Float[Tensor, "b t k d"]) -> Float[Tensor, "b c L k d"]:
        if pad := -t.shape[1] % self.chunk:
            t = F.pad(t, (0, 0, 0, 0, 0, pad))
        return t.unflatten(1, (-1, self.chunk))

    def _tile(self, decay: Decays) -> Float[Tensor, "b c h L L"]:
        tile = decay.dt.new_empty(*decay.target.shape, self.chunk)
        fill_tile(tile, decay.target, decay.source)
        return tile

    def _together(self, t: Float[Tensor, "b c L h p"]) -> Float[Tensor, "b c g L rp"]:
        return t.view(*t.shape[:3], self.groups, -1).transpose(2, 3)

    def _apart(self, t: Float[Tensor, "b c g L rp"]) -> Float[Tensor, "b c L g r p"]:
        return t.transpose(2, 3).unflatten(-1, (self.heads // self.groups, -1))

    def _per_group(self, t: Float[Tensor, "b c L h k"]) -> Float[Tensor, "b c L g r k"]:
        return t.unflatten(3, (self.groups, -1))


class Sums:
    """What the backward adds up over the blocks, taken from the last to the first.

    The gradient of the log-decay of a token is the sum of dy.y - x.dx over the tokens from there to the end of its
    block, y without the skip, and of state.dstate there: no L x L reduction. Its error is that of dy.y in float32, also
    where the state is forgotten at once and the gradient itself is next to nothing.

    Attributes:
        state: Gradient of the state after the block at hand (b, g, n, rp); in the end that of the initial state.
        dA: Gradient of the decay rates (h).
        dD: Gradient of the skip weights (h, p).
        D: The skip weights.
    """

    def __init__(
        self, scan: Scan, dfinal: Float[Tensor, "b h p n"] | None, states: Tensor, A: Tensor, D: Tensor | None
    ) -> None:
        self.state = torch.zeros_like(states[:, 0])
        if dfinal is not None:
            self.state.copy_(scan.wide(dfinal))
        self.A, self.D = A.to(scan.dtype), scan.skip(D)
        self.dA, self.dD = torch.zeros_like(self.A), states.new_zeros(scan.heads, scan.channels)

    def steps(
        self,
        dy_y: Float[Tensor, "b c L h"],
        x_dx: Float[Tensor, "b c L h"],
        end: Float[Tensor, "b 1 h"],
        dt: Float[Tensor, "b c L h"],
    ) -> Float[Tensor, "b t h"]:
        """The gradient of a block's step sizes; that of A is added."""
        dlog = (dy_y - x_dx).flatten(1, 2).flip(1).cumsum(1).flip(1).add_(end)
        self.dA += (dlog * dt.flatten(1, 2)).sum((0, 1))
        return (x_dx / dt).flatten(1, 2).addcmul_(dlog, self.A)

    def skip(self, D: Float[Tensor, "h"] | Float[Tensor, "h p"]) -> Tensor:
        """The gradient of the skip weights."""
        return (self.dD if D.dim() == 2 else self.dD.sum(-1)).to(D.dtype)


def _dot(a: Float[Tensor, "*k p"], b: Float[Tensor, "*k p"]) -> Float[Tensor, "*k"]:
    """Sums over the last axis, as a matrix product: torch's own sum over a short axis is slow on a CPU."""
    product = a * b
    return (product.view(-1, product.shape[-1]) @ product.new_ones(product.shape[-1])).view(product.shape[:-1])
