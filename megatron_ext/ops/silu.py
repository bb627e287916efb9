"""SiLU: whether it is asked for, itself, and with its derivative for one sigmoid.

On a CPU torch computes a sigmoid with an exponential of its own, 1.3 ns a value on a core with AVX-512; its `exp` of
numbers that lie side by side is MKL's, 0.15 ns. So sigmoids are made of that.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from megatron_ext.errors import ConfigError


def is_silu(activation: str | None) -> bool:
    """Whether the activation is SiLU.

    Raises:
        ConfigError: It is neither SiLU nor none.
    """
    if activation not in (None, "silu", "swish"):
        raise ConfigError("the causal convolution knows no such activation", got=activation, legal="None, silu, swish")
    return activation is not None


def silu(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """z sigmoid(z), as a new tensor; no gradient passes."""
    if z.device.type != "cpu":
        return F.silu(z)
    divisor = _divisor(z)
    return torch.div(z, divisor, out=divisor)


def silu_and_derivative(
    z: Float[Tensor, "*shape"], in_place: bool = False
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """z sigmoid(z), written over z if `in_place`, and its derivative sigmoid(z) (1 + z - z sigmoid(z))."""
    derivative = _divisor(z).reciprocal_() if z.device.type == "cpu" else torch.sigmoid(z)
    value = z.mul_(derivative) if in_place else z * derivative
    # sigmoid + silu (1 - sigmoid) in one pass
    return value, derivative.lerp_(derivative.new_ones(()), value)


def _divisor(z: Tensor) -> Tensor:
    """1 + exp(-z), infinite where that is too large."""
    return torch.neg(z).exp_().add_(1)
