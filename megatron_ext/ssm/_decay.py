"""The decays of a chunk: exact where sums cancel, clamped where exponentials are slow."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Exponents of two below which a decay counts as nothing. Results near the smallest normal number make every later
# product 10 to 50 times slower on a CPU, so decays stop well above it.
FLOOR = {torch.float32: -100.0, torch.float64: -1000.0}
# A step size above 2**CEILING is cut to it. It also keeps the unused upper triangle of a tile finite.
CEILING = 60.0
# Added to the exponent at the first token of a document: far below every floor.
FORGET = -4096.0


class Decays(NamedTuple):
    """What one chunk of L tokens does to a state. Exponents are to base two: exp2 is faster than exp."""

    dt: Float[Tensor, "b c L h"]
    """Step sizes, raised to at least 2**(0.4 FLOOR), so that the gradient x.dx / dt has a limit at dt = 0."""
    from_start: Float[Tensor, "b c L h"]
    """Decay of the chunk's first state up to and with each token."""
    to_end: Float[Tensor, "b c L h"]
    """dt times the decay after each token up to the chunk's end."""
    whole: Float[Tensor, "b c g 1 rp"]
    """Decay over the whole chunk, repeated for every channel of its head."""
    target: Float[Tensor, "b c h L"]
    """Exponent summed from the chunk's start, float64."""
    source: Float[Tensor, "b c h L"]
    """The same minus log2(dt), float64: target[i] - source[j] is the exponent of what token j weighs in token i."""

    def of(self, rows: slice, chunks: slice) -> "Decays":
        """The decays of some rows and chunks."""
        return Decays(*(t[rows, chunks] for t in self))


def decays(
    dt: Float[Tensor, "b c L h"],
    A: Float[Tensor, "h"],
    starts: Bool[Tensor, "b c L"] | None,
    groups: int,
    channels: int,
    dtype: torch.dtype,
) -> Decays:
    """The decays of every chunk.

    The sums are float64: differences of float32 sums lose 1e-7 of the sum, and exponentiation turns that absolute
    error into a relative one. They are (b, l, h) only; each tile is rounded once, when it is built.

    Args:
        dt: Step sizes, not negative.
        A: Decay rates, negative.
        starts: Where a document begins and the state is forgotten.
        groups: g.
        channels: p, channels of a head.
        dtype: What the scan accumulates in, float32 or float64.
    """
    b, c, _, h = dt.shape
    floor = FLOOR[dtype]
    steps = dt.double().clamp(2.0 ** (0.4 * floor), 2.0**CEILING)
    exponents = dt.double() * (A.double() * math.log2(math.e))
    if starts is not None:
        exponents = exponents.masked_fill(starts.unsqueeze(-1), FORGET)
    sums = exponents.cumsum(2)
    from_start = sums.clamp_min(floor).to(dtype).exp2_()
    to_end = (sums[:, :, -1:] - sums).clamp_(min=floor).to(dtype).exp2_().mul_(steps)
    whole = from_start[:, :, -1].view(b, c, groups, 1, h // groups, 1)
    target = sums.transpose(2, 3).contiguous()
    return Decays(
        dt=steps.to(dtype),
        from_start=from_start,
        to_end=to_end,
        whole=whole.expand(-1, -1, -1, -1, -1, channels).reshape(b, c, groups, 1, -1),
        target=target,
        source=target - steps.transpose(2, 3).log2(),
    )


def fill_tile(
    tile: Float[Tensor, "*k h L L"], target: Float[Tensor, "*k h L"], source: Float[Tensor, "*k h L"]
) -> None:
    """Write dt_j times the decay from token j to i into `tile[i, j]`; above the diagonal it is finite, not zero."""
    torch.sub(target.unsqueeze(-1), source.unsqueeze(-2), out=tile)
    tile.clamp_(FLOOR[tile.dtype], CEILING).exp2_()
