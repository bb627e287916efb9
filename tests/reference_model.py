"""A hybrid model in plain formulas and float64, straight from a checkpoint's tensors: nothing of Megatron's, no layout.

Shapes: b batch, s sequence, h hidden, g groups, n heads, d channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.models.config import Architecture
from megatron_ext.ssm import naive


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def attention(arch: Architecture, w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The update of an attention layer without positions, and its heads' outputs (b, s, n, d)."""
    b, s, _ = x.shape
    groups, d = arch.num_query_groups, arch.kv_channels
    per_group = arch.num_attention_heads // groups
    qkv = (x @ w["self_attention.linear_qkv.weight"].T).view(b, s, groups, per_group + 2, d)
    heads = torch.empty(b, s, groups, per_group, d, dtype=x.dtype)
    mask = torch.ones(s, s, dtype=torch.bool).tril()
    for group in range(groups):
        key, value = qkv[:, :, group, per_group], qkv[:, :, group, per_group + 1]
        for head in range(per_group):
            logits = (qkv[:, :, group, head] @ key.mT) / d**0.5
            heads[:, :, group, head] = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ value
    out = heads.reshape(b, s, -1) @ w["self_attention.linear_proj.weight"].T
    return out, heads.reshape(b, s, -1, d)


def mlp(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The update of a gated MLP, and its neurons (b, s, f)."""
    gate, up = (x @ w["mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
    neurons = F.silu(gate) * up
    return neurons @ w["mlp.linear_fc2.weight"].T, neurons


def mamba(arch: Architecture, w: dict[str, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """The update of a Mamba-2 layer, and the x part of its input projection (b, s, n, d)."""
    groups = arch.mamba_num_groups
    z, x, B, C, dt = (u @ w[f"mixer.in_proj.weight.{name}"].T for name in ("z", "x", "B", "C", "dt"))
    convolved = []
    for name, value in (("x", x), ("B", B), ("C", C)):
        taps, bias = w[f"mixer.conv1d.weight.{name}"].squeeze(1), w[f"mixer.conv1d.bias.{name}"]
        convolved.append(naive.causal_conv1d(value, taps, bias, activation="silu")[0])
    cx, cB, cC = convolved
    y, _ = naive.ssd(
        cx.unflatten(-1, (-1, arch.mamba_head_dim)),
        F.softplus(dt + w["mixer.dt_bias"]),
        -w["mixer.A_log"].exp(),
        cB.unflatten(-1, (groups, -1)),
        cC.unflatten(-1, (groups, -1)),
        w["mixer.D"],
    )
    gated = (y.flatten(2) * F.silu(z)).unflatten(-1, (groups, -1))
    normed = rms_norm(gated, torch.ones((), dtype=u.dtype), 1e-5).flatten(2) * w["mixer.norm.weight"]
    return normed @ w["mixer.out_proj.weight"].T, x.unflatten(-1, (-1, arch.mamba_head_dim))


def forward(arch: Architecture, weights: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Logits (b, s, v), and for each sub-layer its `input`, `norm`, `inner` activation and `output`."""
    weights = {key: value.double() for key, value in weights.items()}
    hidden = weights["embedding.word_embeddings.weight"][tokens]
    seen = []
    for i, kind in enumerate(arch.pattern):
        prefix = f"decoder.layers.{i}."
        w = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        (norm_weight,) = (value for key, value in w.items() if key.endswith("layer_norm_weight"))
        normed = rms_norm(hidden, norm_weight, arch.norm_epsilon)
        if kind == "*":
            update, inner = attention(arch, w, normed)
        elif kind == "-":
            update, inner = mlp(w, normed)
        else:
            update, inner = mamba(arch, w, normed)
        seen.append({"input": hidden, "norm": normed, "inner": inner, "output": hidden + update})
        hidden = hidden + update
    final = rms_norm(hidden, weights["decoder.final_norm.weight"], arch.norm_epsilon)
    return final @ weights["output_layer.weight"].T, seen
