"""Logits that a smooth bound keeps within plus and minus c: c tanh(x / c), as in Gemma 2."""

from jaxtyping import Float
from torch import Tensor


def softcapped(logits: Float[Tensor, "*n v"], cap: float | None) -> Float[Tensor, "*n v"]:
    """cap tanh(logits / cap), differentiable; the logits themselves where there is no cap."""
    return logits if cap is None else cap * (logits / cap).tanh()


def softcap_(logits: Float[Tensor, "*n v"], cap: float | None) -> None:
    """`softcapped` in place."""
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)


def softcap_grad(capped: Float[Tensor, "*n v"], cap: float | None) -> Float[Tensor, "*n v"] | None:
    """The derivative where the result is `capped`, 1 - (capped / cap)^2; None where there is no cap."""
    return None if cap is None else 1 - (capped / cap).square_()
