"""SwiGLU by its definition; plain differentiable torch, in any dtype."""

from jaxtyping import Float
from torch import Tensor


def swiglu(y: Float[Tensor, "*batch g"]) -> Float[Tensor, "*batch f"]:
    """silu(a) b, a the first half of the channels and b the second (f = g / 2)."""
    a, b = y.chunk(2, -1)
    return a / (1 + (-a).exp()) * b
