"""The chunked scan of one block of chunks, forward and backward: what `ssd.cpu` and `mamba_mixer.cpu` loop over.

Shapes: b batch, t = c L tokens in c chunks, h = g r heads in g groups, p head channels, n state size; x, B and C side
by side are conv = h p + 2 g n channels. A state is kept as (g, n, r p): the channels of a group's heads side by side,
one wide matrix product instead of r narrow ones.

A block is so small that the calls of torch themselves count: hence views rather than copies, results written where
they belong (`out=`), and in-place sums.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_ext.ops.cache_blocks import blocks, rows_per_block
from megatron_ext.ops.ssd.cpu_decays import Decays, decays


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
        rows = rows_per_block(self.batch, device)
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
        states[:, 0] = 0 if initial is None else self.to_layout(initial)
        return states

    def skip(self, D: Float[Tensor, "h"] | Float[Tensor, "h p"] | None) -> Float[Tensor, "g r p"] | None:
        """Skip weights of every channel."""
        if D is None:
            return None
        D = D if D.dim() == 2 else D.unsqueeze(-1).expand(-1, self.channels)
        return D.to(self.dtype).reshape(self.groups, -1, self.channels)

    def to_layout(self, state: Float[Tensor, "b h p n"]) -> Float[Tensor, "b g n rp"]:
        """A state in the layout of the scan."""
        return state.reshape(state.shape[0], self.groups, -1, state.shape[-1]).mT

    def from_layout(self, state: Float[Tensor, "b g n rp"]) -> Float[Tensor, "b h p n"]:
        """A state in the layout that callers have."""
        return state.mT.reshape(state.shape[0], self.heads, -1, state.shape[2])

    def forward(
        self,
        xBC: Float[Tensor, "b t conv"],
        D: Float[Tensor, "g r p"] | None,
        decay: Decays,
        states: Float[Tensor, "b s g n rp"],
        out: Float[Tensor, "b t hp"],
    ) -> None:
        """Write y of a block to `out`, and the states in it and after it behind the one before it in `states`."""
        x, B, C = self._as_matrices(self._chunked(xBC))
        y = self._per_head(self._chunked(out))
        _product(B.mT, self._merge_heads(x * decay.to_end), out=states[:, 1:])
        state, *later = states.unbind(1)
        for whole, after in zip(decay.whole.unbind(1), later, strict=True):
            state = after.addcmul_(state, whole)
        tile = decay.tile()
        mixing = tile.mul_(torch.bmm(C, B.mT).tril_().view(*tile.shape[:3], 1, *tile.shape[4:]))
        intra = torch.bmm(_matrices(mixing), _matrices(self._heads_first(x)))
        inter = self._split_heads(torch.bmm(C, _matrices(states[:, :-1])), y)
        torch.addcmul(self._tokens_first(intra, y), inter, decay.from_start, out=y)
        if D is not None:
            y.addcmul_(x, D)
        if out.shape[1] % self.chunk:  # y is a padded copy
            out.copy_(y.flatten(3).flatten(1, 2)[:, : out.shape[1]])

    def backward(
        self,
        xBC: Float[Tensor, "b t conv"],
        y: Float[Tensor, "b t hp"],
        dy: Float[Tensor, "b t hp"],
        decay: Decays,
        states: Float[Tensor, "b s g n rp"],
        grads: "ScanGradAccumulator",
        rows: slice,
    ) -> tuple[Float[Tensor, "b t conv"], Float[Tensor, "b t h"]]:
        """The gradients of a block's xBC and dt; the blocks behind it have been taken.

        What is summed over tokens is added to `grads`.
        """
        tokens, xBC = xBC.shape[1], self._chunked(xBC)
        y, dy = self._per_head(self._chunked(y)), self._per_head(self._chunked(dy))
        dxBC = torch.empty(xBC.shape, dtype=xBC.dtype, device=xBC.device)
        (x, B, C), (dx, dB, dC) = self._as_matrices(xBC), self._split(dxBC)
        dx, previous, product = self._per_head(dx), _matrices(states[:, :-1]), dy * decay.from_start
        dyw = self._merge_heads(product)

        # between chunks: the recurrence backwards, in place; the gradient of the state before each chunk and after all
        dstates = torch.empty(states.shape, dtype=states.dtype, device=states.device)
        _product(C.mT, dyw, out=dstates[:, :-1])
        *earlier, dstate = dstates.unbind(1)
        dstate.copy_(grads.state[rows])
        for whole, dprevious in zip(reversed(decay.whole.unbind(1)), reversed(earlier), strict=True):
            dstate = dprevious.addcmul_(dstate, whole)
        grads.state[rows] = dstate
        dstate_state = (dstates[:, 1:] * states[:, 1:]).sum(3).view(*x.shape[:2], self.heads, -1).sum(-1)
        dafter = _matrices(dstates[:, 1:])

        # within chunks; what is no longer needed is written over, for memory at hand is in the cache
        tile = decay.tile()
        mixing = tile * torch.bmm(C, B.mT).tril_().view(*tile.shape[:3], 1, *tile.shape[4:])
        xh, dyh = _matrices(self._heads_first(x)), _matrices(self._heads_first(dy))
        intra = self._tokens_first(torch.bmm(_matrices(mixing).mT, dyh), dx)
        torch.addcmul(intra, self._split_heads(torch.bmm(B, dafter), dx), decay.to_end, out=dx)
        torch.bmm(dyh, xh.mT, out=_matrices(mixing))
        dCB = _matrices(mixing.mul_(tile).sum(3)).tril_()
        dC.copy_(self._merge_groups(torch.bmm(dyw, previous.mT).baddbmm_(dCB, B), dC))
        xw = self._merge_heads(torch.mul(x, decay.to_end, out=product))
        dB.copy_(self._merge_groups(torch.bmm(xw, dafter.mT).baddbmm_(dCB.mT, C), dB))

        x_dx = self._over_channels(torch.mul(x, dx, out=product))
        dy_y = self._over_channels(torch.mul(dy, y, out=product))
        if grads.skip is not None:
            dx.addcmul_(dy, grads.skip)
            dy_y.sub_(self._skipped(torch.mul(x, dy, out=product), grads))
        ddt = grads.steps(dy_y, x_dx, dstate_state, decay.dt)
        return dxBC.view(xBC.shape[0], -1, xBC.shape[-1])[:, :tokens], ddt[:, :tokens]

    def _skipped(self, x_dy: Float[Tensor, "b c L g r p"], grads: "ScanGradAccumulator") -> Float[Tensor, "b t h"]:
        """dy.(D x) of each token; the gradient of D is added."""
        if grads.D.dim() == 2:
            grads.dD.add_(x_dy.sum((0, 1, 2)).view(grads.D.shape))
            return self._over_channels(x_dy.mul_(grads.D.view(x_dy.shape[3:])))
        of_heads = self._over_channels(x_dy)
        grads.dD.add_(of_heads.sum((0, 1)))
        return of_heads.mul_(grads.D)

    def _chunked(self, t: Float[Tensor, "b t d"]) -> Float[Tensor, "b c L d"]:
        if pad := -t.shape[1] % self.chunk:
            t = F.pad(t, (0, 0, 0, pad))
        return t.view(t.shape[0], -1, self.chunk, t.shape[2])

    def inputs(
        self, xBC: Float[Tensor, "b t conv"]
    ) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b t g n"], Float[Tensor, "b t g n"]]:
        """x, B and C."""
        x, B, C = self._split(xBC)
        return x.unflatten(-1, (self.heads, -1)), B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1))

    def _split(self, xBC: Float[Tensor, "*b conv"]) -> tuple[Tensor, Tensor, Tensor]:
        inner = self.heads * self.channels
        state = (xBC.shape[-1] - inner) // 2
        x, B, C = xBC.split_with_sizes([inner, state, state], -1)
        return x, B, C

    def _as_matrices(
        self, xBC: Float[Tensor, "b c L conv"]
    ) -> tuple[Float[Tensor, "b c L g r p"], Float[Tensor, "k L n"], Float[Tensor, "k L n"]]:
        """x, and B and C as the matrices of k = b c g chunks and groups."""
        x, B, C = self._split(xBC)
        shape = (*xBC.shape[:3], self.groups, -1)
        return self._per_head(x), _matrices(B.view(shape).transpose(2, 3)), _matrices(C.view(shape).transpose(2, 3))

    def _per_head(self, t: Float[Tensor, "b c L hp"]) -> Float[Tensor, "b c L g r p"]:
        return t.view(*t.shape[:3], self.groups, -1, self.channels)

    def _heads_first(self, t: Float[Tensor, "b c L g r p"]) -> Float[Tensor, "b c g r L p"]:
        return t.permute(0, 1, 3, 4, 2, 5)

    def _tokens_first(self, t: Float[Tensor, "kr L p"], like: Tensor) -> Float[Tensor, "b c L g r p"]:
        b, c, length, g, r, p = like.shape
        return t.view(b, c, g, r, length, p).permute(0, 1, 4, 2, 3, 5)

    def _merge_heads(self, t: Float[Tensor, "b c L g r p"]) -> Float[Tensor, "k L rp"]:
        """The channels of a group's heads side by side."""
        return _matrices(t.reshape(*t.shape[:4], -1).transpose(2, 3))

    def _split_heads(self, t: Float[Tensor, "k L rp"], like: Tensor) -> Float[Tensor, "b c L g r p"]:
        b, c, length, g, r, p = like.shape
        return t.view(b, c, g, length, r, p).transpose(2, 3)

    def _merge_groups(self, t: Float[Tensor, "k L n"], like: Tensor) -> Float[Tensor, "b c L gn"]:
        b, c, length, _ = like.shape
        return t.view(b, c, self.groups, length, -1).transpose(2, 3).reshape(like.shape)

    def _over_channels(self, t: Float[Tensor, "b c L g r p"]) -> Float[Tensor, "b t h"]:
        """Sums over channels, as a matrix product: torch's own sum over a short axis is slow on a CPU."""
        return t.reshape(-1, self.channels).mv(t.new_ones(self.channels)).view(t.shape[0], -1, self.heads)


def _matrices(t: Float[Tensor, "*k m n"]) -> Float[Tensor, "k m n"]:
    """One axis for all that is not a matrix."""
    return t.reshape(-1, *t.shape[-2:])


def _product(a: Float[Tensor, "k m l"], b: Float[Tensor, "k l n"], out: Float[Tensor, "b c g m n"]) -> None:
    """a b, written where it belongs if that is one piece of memory."""
    if out.is_contiguous():
        torch.bmm(a, b, out=_matrices(out))
    else:
        out.copy_(torch.bmm(a, b).view(out.shape))


class ScanGradAccumulator:
    """Gradients that the backward adds up over the blocks, taken from the last to the first.

    The gradient of the log-decay of a token is the sum of dy.y - x.dx over the tokens from there to the end of its
    chunk and of state.dstate there: no L x L reduction. Its error is that of dy.y in float32, also where the state is
    forgotten at once and the gradient itself is next to nothing; from chunk to chunk it does not add up.

    Attributes:
        state: Gradient of the state after the block at hand (b, g, n, rp); in the end that of the initial state.
        dA: Gradient of the decay rates (h).
        dD: Gradient of the skip weights, per head or per channel as they are.
    """

    def __init__(
        self, scan: Scan, dfinal: Float[Tensor, "b h p n"] | None, states: Tensor, A: Tensor, D: Tensor | None
    ) -> None:
        self.state = torch.zeros_like(states[:, 0])
        if dfinal is not None:
            self.state.copy_(scan.to_layout(dfinal))
        self.A, self.skip = A.to(scan.dtype), scan.skip(D)
        self.D = states.new_empty(0) if D is None else D.to(scan.dtype)
        self.dA, self.dD = torch.zeros_like(self.A), torch.zeros_like(self.D)

    def steps(
        self,
        dy_y: Float[Tensor, "b t h"],
        x_dx: Float[Tensor, "b t h"],
        dstate_state: Float[Tensor, "b c h"],
        dt: Float[Tensor, "b c L h"],
    ) -> Float[Tensor, "b t h"]:
        """The gradient of a block's step sizes; that of A is added."""
        dlog = (dy_y - x_dx).view(dt.shape)
        dlog[:, :, -1].add_(dstate_state)
        dlog, dt = (t.reshape(x_dx.shape) for t in (dlog.flip(2).cumsum(2).flip(2), dt))
        self.dA.add_((dlog * dt).sum((0, 1)))
        return (x_dx / dt).addcmul_(dlog, self.A)
