"""Rotary position embedding by its definition: every pair of channels times a matrix; plain differentiable torch."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotary(
    t: Float[Tensor, "s b n d"], angles: Float[Tensor, "s #b #n r"], scale: float = 1.0, interleaved: bool = False
) -> Float[Tensor, "s b n d"]:
    """Each pair of channels times `scale` and the rotation by its angles.

    Args:
        t: Queries or keys.
        angles: Of both channels of the pairs, in radians; the same ones twice.
        scale: Of the cosines and sines.
        interleaved: Pairs are channels 2 i and 2 i + 1, instead of i and i + r / 2.
    """
    turned = list(range(angles.shape[-1]))
    half = len(turned) // 2
    one, other = (turned[::2], turned[1::2]) if interleaved else (turned[:half], turned[half:])
    pairs = torch.stack([t[..., one], t[..., other]], -1)  # (s, b, n, r / 2, 2)
    first, second = angles[..., one], angles[..., other]
    matrix = torch.stack(
        [torch.stack([first.cos(), -first.sin()], -1), torch.stack([second.sin(), second.cos()], -1)], -2
    )
    rotated = (scale * matrix @ pairs[..., None])[..., 0]
    out = t.clone()
    out[..., one], out[..., other] = rotated[..., 0], rotated[..., 1]
    return out
