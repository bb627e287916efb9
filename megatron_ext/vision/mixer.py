"""What mixes the tokens of a window: MambaVision's mixer, in the four arms of its ablation, and attention.

Channels of the two branches lie in pairs, x_0, z_0, x_1, z_1, ..., and queries, keys and values head by head: so a
tensor-parallel rank has whole pairs and whole heads in one piece of each weight.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from megatron_ext.ops import dispatch
from megatron_ext.ops.selective_scan import exportable
from megatron_ext.vision.architecture import KERNEL, MambaVision
from megatron_ext.vision.linears import Linears, fill, split

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # Mamba's step sizes at the beginning


class MambaVisionMixer(nn.Module):
    """A selective scan in one branch, and another beside it (arXiv 2407.08083, section 3.2 and table 5).

    Both come from one projection to twice half of the channels. `concatenated`: a convolution and SiLU in each, the
    scan in the first, then side by side into the last projection. `gated`: the same, but their product. `one-branch`:
    no convolution in the second, which only gates. `causal`: as that, and the convolution of the first sees no later
    token, which is Mamba's own mixer.

    Args:
        model: The network.
        stage: Counted from 0.
        linears: How linear layers are made.
    """

    def __init__(self, model: MambaVision, stage: int, linears: Linears) -> None:
        super().__init__()
        channels, inner, rank = model.channels(stage), model.inner(stage), model.dt_rank(stage)
        self.arm, self.state, self.rank, self.linears = model.mixer, model.state, rank, linears
        self._mamba_steps = model.dt_init == "mamba"
        own = inner // linears.size
        convolved = own if model.mixer in ("one-branch", "causal") else 2 * own
        self.in_proj = linears.column(channels, 2 * inner, bias=False)
        self.conv_weight = split(nn.Parameter(torch.empty(convolved, 1, KERNEL)), 0, linears)
        self.x_proj = linears.row(inner, rank + 2 * model.state, bias=False)
        self.dt_proj = linears.column(rank, inner, bias=True)
        # (channels, states), flat: what has one dimension has no weight decay, in Megatron and in timm.
        self.A_log = split(nn.Parameter(torch.empty(own * model.state)), 0, linears)
        self.D = split(nn.Parameter(torch.empty(own)), 0, linears)
        self.out_proj = linears.row(2 * inner if model.mixer == "concatenated" else inner, channels, bias=False)

    def reset_parameters(self) -> None:
        """Fill what is no linear layer's, and with `dt_init` mamba what makes step sizes."""
        bound = KERNEL**-0.5  # as torch's own depthwise convolution
        fill(self.conv_weight, self.linears, lambda t: t.uniform_(-bound, bound))
        with torch.no_grad():
            self.A_log.unflatten(0, (-1, self.state)).copy_(torch.arange(1, self.state + 1, dtype=torch.float32).log())
            self.D.fill_(1.0)
        if self._mamba_steps:
            weight, bias = self.dt_proj.weight, self.dt_proj.bias
            fill(weight, self.linears, lambda t: t.uniform_(-(self.rank**-0.5), self.rank**-0.5))  # type: ignore[arg-type]
            fill(bias, self.linears, _draw_steps)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b l c"]:
        """The mixed tokens of each window, in the order of its rows."""
        pairs = self.in_proj(x)
        if self.arm in ("concatenated", "gated"):
            x, z = self._convolve(pairs).unflatten(-1, (-1, 2)).unbind(-1)
        else:
            x, z = pairs.unflatten(-1, (-1, 2)).unbind(-1)
            x, z = self._convolve(x), F.silu(z)
        dt, B, C = self.x_proj(x).split([self.rank, self.state, self.state], -1)
        kind = torch.promote_types(x.dtype, torch.float32)
        rates, skip = -self.A_log.to(kind).exp().unflatten(0, (-1, self.state)), self.D.to(kind)
        if torch.compiler.is_exporting():
            scan = exportable.selective_scan
        else:
            scan = dispatch.backend(x=x, state=self.state).selective_scan
        shared = self.linears.shared
        y, _ = scan(x, self.dt_proj(dt), rates, shared(B), shared(C), skip, dt_softplus=True)
        return self.out_proj(torch.stack([y, z], -1).flatten(-2) if self.arm == "concatenated" else y * z)

    def _convolve(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """A convolution of each channel by itself, and SiLU."""
        before = KERNEL - 1 if self.arm == "causal" else KERNEL // 2
        padded = F.pad(x.mT, (before, KERNEL - 1 - before))
        return F.silu(F.conv1d(padded, self.conv_weight, groups=self.conv_weight.shape[0])).mT


def _draw_steps(bias: Tensor) -> None:
    """Biases whose softplus is spread evenly over the logarithms of `DT_MIN` to `DT_MAX` (Mamba, section 3.6)."""
    span = math.log(DT_MAX) - math.log(DT_MIN)
    steps = torch.exp(torch.rand_like(bias) * span + math.log(DT_MIN)).clamp(min=DT_FLOOR)
    bias.copy_(steps + torch.log(-torch.expm1(-steps)))


class Attention(nn.Module):
    """Attention of the tokens of a window to each other.

    Args:
        model: The network.
        stage: Counted from 0.
        linears: How linear layers are made.
    """

    def __init__(self, model: MambaVision, stage: int, linears: Linears) -> None:
        super().__init__()
        channels, width = model.channels(stage), model.heads(stage) * model.head_dim
        self.head_dim = model.head_dim
        self.qkv = linears.column(channels, 3 * width, bias=True)
        self.proj = linears.row(width, channels, bias=True)

    def forward(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b l c"]:
        """The mixed tokens of each window."""
        heads = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim)).transpose(1, 2)  # (b, heads, l, 3, head channels)
        q, k, v = heads.unbind(3)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
