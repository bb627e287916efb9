"""Linear layers on a CPU, by the library that is fast there, and with the gradient of the weight where it belongs.

Torch gives float32 products to Intel's MKL, which on AMD processors keeps to slower kernels: 70 to 75 GFLOP/s on a core
of Zen 2, where oneDNN, which torch carries too, reaches 85 to 100 once there are some hundred rows and columns.

Where Megatron adds up a weight's gradients, the product of the backward pass is added there at once: otherwise a tensor
of the weight's size is made, read, and thrown away in every layer.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.platform.main_grad import add_to_main_grad, main_grad

# oneDNN puts its second factor in order first, which must pay: where there are so many tokens and channels, and in the
# gradient of the weight, whose sums are as long as the sequence, so many columns.
TOKENS, CHANNELS, COLUMNS = 512, 64, 768


def linear(
    x: Float[Tensor, "*batch i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, "o"] | None = None
) -> Float[Tensor, "*batch o"]:
    """`torch.nn.functional.linear`, by oneDNN where that is faster: float32 on an AMD CPU, and not tiny.

    Differentiable once where oneDNN is used, or where `weight.main_grad` takes the gradient. The last bits of the
    result depend on the library.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    large = min(weight.shape) >= CHANNELS and x.numel() >= TOKENS * x.shape[-1]
    onednn = large and x.dtype == weight.dtype == torch.float32 and prefers_onednn()
    if onednn or (torch.is_grad_enabled() and main_grad(weight) is not None):
        return _Linear.apply(x, weight, bias, onednn)  # type: ignore[return-value]
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, onednn):
        ctx.save_for_backward(x)
        ctx.weight, ctx.onednn = weight, onednn
        return _product(x, weight, bias) if onednn else F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[override]
        (x,), weight, needed = ctx.saved_tensors, ctx.weight, ctx.needs_input_grad
        dx = None
        if needed[0]:
            dx = _product(dy, weight.T) if ctx.onednn else dy @ weight
        dy = dy.reshape(-1, dy.shape[-1])
        dweight = _weight_gradient(dy, x.reshape(-1, x.shape[-1]), weight, ctx.onednn) if needed[1] else None
        return dx, dweight, dy.sum(0) if needed[2] else None, None


def _weight_gradient(dy: Float[Tensor, "k o"], x: Float[Tensor, "k i"], weight: Tensor, onednn: bool) -> Tensor:
    """dy^T x, in `main_grad` if there is one."""
    main = main_grad(weight)
    if onednn:
        return add_to_main_grad(weight, _transposed_product(dy, x))
    if main is not None and main.dtype == dy.dtype:
        main.addmm_(dy.T, x)
        return add_to_main_grad(weight, None)
    return add_to_main_grad(weight, dy.T @ x)


def _transposed_product(a: Float[Tensor, "k m"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """a^T b, the longer side of the result as oneDNN's columns."""
    if max(a.shape[1], b.shape[1]) < COLUMNS:
        return a.T @ b
    return _product(a.T, b.T) if b.shape[1] > a.shape[1] else _product(b.T, a.T).T


def _product(x: Float[Tensor, "*m k"], weight: Float[Tensor, "n k"], bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def prefers_onednn(processor: Path = Path("/proc/cpuinfo")) -> bool:
    """By the processor's maker and not by measurement, so that ranks agree to the last bit."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return processor.exists() and "AuthenticAMD" in processor.read_text()
