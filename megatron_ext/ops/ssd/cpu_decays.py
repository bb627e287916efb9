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
    from_start: Float[Tensor, "b c L g r 1"]
    """Decay of the chunk's first state up to and with each token."""
    to_end: Float[Tensor, "b c L g r 1"]
    """dt times the decay after each token up to the chunk's end."""
    whole: Float[Tensor, "b c g 1 rp"]
    """Decay over the whole chunk, repeated for every channel of its head."""
    target: Float[Tensor, "b c 2 g r L"]
    """Exponent summed from the chunk's start: what a float32 holds of it, and the rest."""
    source: Float[Tensor, "b c 2 g r L"]
    """The same minus log2(dt): target[i] - source[j] is the exponent of what token j weighs in token i."""

    def of(self, rows: slice, chunks: slice) -> "Decays":
        """The decays of some rows and chunks."""
        return Decays(*(t[rows, chunks] for t in self))

    def tile(self) -> Float[Tensor, "b c g r L L"]:
        """dt_j times the decay from token j to i at [i, j]; above the diagonal it is finite, not zero."""
        target, target_rest = self.target.unsqueeze(-1).unbind(2)
        source, source_rest = self.source.unsqueeze(-2).unbind(2)
        exponents = (target - source).add_(target_rest).sub_(source_rest)
        return exponents.clamp_(FLOOR[exponents.dtype], CEILING).exp2_()


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
    error into a relative one. They are (b, l, h) only; the tiles are made of their two float32 halves, because a
    tile of float64 numbers would be written, read and rounded first.

    Args:
        dt: Step sizes, not negative.
        A: Decay rates, negative.
        starts: Where a document begins and the state is forgotten.
        groups: g.
        channels: p, channels of a head.
        dtype: What the scan accumulates in, float32 or float64.
    """
    b, c, length, h = dt.shape
    by_group = (b, c, length, groups, h // groups)
    floor = FLOOR[dtype]
    steps = dt.double().clamp(2.0 ** (0.4 * floor), 2.0**CEILING)
    exponents = dt.double() * (A.double() * math.log2(math.e))
    if starts is not None:
        exponents = exponents.masked_fill(starts.unsqueeze(-1), FORGET)
    sums = exponents.cumsum(2)
    from_start = sums.clamp_min(floor).to(dtype).exp2_()
    to_end = (sums[:, :, -1:] - sums).clamp_(min=floor).to(dtype).exp2_().mul_(steps)
    whole = from_start[:, :, -1].view(b, c, groups, 1, h // groups, 1)
    target, less = (t.view(by_group).permute(0, 1, 3, 4, 2) for t in (sums, steps.log2()))
    return Decays(
        dt=steps.to(dtype),
        from_start=from_start.view(*by_group, 1),
        to_end=to_end.view(*by_group, 1),
        whole=whole.expand(-1, -1, -1, -1, -1, channels).reshape(b, c, groups, 1, -1),
        target=_halves(target, dtype),
        source=_halves(target - less, dtype),
    )


def _halves(t: Float[Tensor, "b c g r L"], dtype: torch.dtype) -> Float[Tensor, "b c 2 g r L"]:
    """t rounded, and what rounding took away."""
    rounded = t.to(dtype)
    return torch.stack([rounded, (t - rounded).to(dtype)], 2)
