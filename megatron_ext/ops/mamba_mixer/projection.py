"""The parts of a Mamba-2 layer's input projection."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """Gate z, inputs x, B, C and raw step sizes side by side, of h p, h p, g n, g n and h channels.

    Attributes:
        heads: h.
        channels: p.
        groups: g.
    """

    heads: int
    channels: int
    groups: int

    @property
    def inner(self) -> int:
        """h p."""
        return self.heads * self.channels

    def parts(
        self, zxbcdt: Float[Tensor, "b l in_proj"]
    ) -> tuple[Float[Tensor, "b l hp"], Float[Tensor, "b l conv"], Float[Tensor, "b l h"]]:
        """z; x, B and C together; dt."""
        z, xBC, dt = zxbcdt.split([self.inner, zxbcdt.shape[-1] - self.inner - self.heads, self.heads], -1)
        return z, xBC, dt

    def inputs(
        self, xBC: Float[Tensor, "b l conv"]
    ) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b l g n"], Float[Tensor, "b l g n"]]:
        """x, B and C."""
        state = (xBC.shape[-1] - self.inner) // 2
        x, B, C = xBC.split([self.inner, state, state], -1)
        return x.unflatten(-1, (self.heads, -1)), B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1))
