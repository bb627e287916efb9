"""SiLU: whether it is asked for, and with its derivative for one sigmoid, which costs six products on a CPU."""

import torch
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


def silu_and_derivative(
    z: Float[Tensor, "*shape"], in_place: bool = False
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """z sigmoid(z), written over z if `in_place`, and its derivative sigmoid(z) (1 + z - z sigmoid(z))."""
    derivative = torch.sigmoid(z)
    value = z.mul_(derivative) if in_place else z * derivative
    # sigmoid + silu (1 - sigmoid) in one pass
    return value, derivative.lerp_(derivative.new_ones(()), value)
