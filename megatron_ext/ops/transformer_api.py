"""Operations of Transformer layers behind the signatures by which Megatron-Core calls its fused ones, for a CPU.

What they can do and ours cannot does not come here: other models and flags are refused on a CPU before.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from megatron_ext.ops.causal_attention import cpu as attention
from megatron_ext.ops.gated_norm.cpu import gated_rms_norm
from megatron_ext.ops.rotary.cpu import rotary
from megatron_ext.ops.swiglu.cpu import swiglu


def bias_swiglu_impl(input: Float[Tensor, "*batch g"], bias: Float[Tensor, "g"] | None, *_: Any) -> Tensor:
    """`megatron.core.fusions.fused_bias_swiglu.bias_swiglu_impl`: silu(a) b of the halves of input + bias."""
    return swiglu(input if bias is None else input + bias)


def weighted_bias_swiglu_impl(
    input: Float[Tensor, "*batch g"], bias: Float[Tensor, "g"] | None, weights: Float[Tensor, "*batch 1"], *_: Any
) -> Tensor:
    """`weighted_bias_swiglu_impl` of the same module: times the router's weight of each token."""
    return (bias_swiglu_impl(input, bias) * weights).to(input.dtype)


def apply_rotary(
    t: Float[Tensor, "s b n d"],
    freqs: Float[Tensor, "s #b #n r"],
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
    multi_latent_attention: bool | None = None,
) -> Float[Tensor, "s b n d"]:
    """`megatron.core.models.common.embeddings.rope_utils._apply_rotary_pos_emb_bshd`, but for latent attention."""
    assert not mla_rotary_interleaved
    assert not multi_latent_attention
    return rotary(t, freqs, mscale, rotary_interleaved)


def rms_norm(x: Float[Tensor, "*batch d"], weight: Float[Tensor, "d"], eps: float) -> Float[Tensor, "*batch d"]:
    """`torch.nn.functional.rms_norm` over the last dimension, with a backward that computes nothing twice.

    Without a gradient torch's own is as fast.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return gated_rms_norm(x, weight, None, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def causal_attention(
    q: Float[Tensor, "b n s d"], k: Float[Tensor, "b g s d"], v: Float[Tensor, "b g s d"], scale: float | None
) -> Float[Tensor, "b n s d"]:
    """`torch.nn.functional.scaled_dot_product_attention` of a sequence to itself, with a faster backward in float32."""
    if torch.is_grad_enabled() and q.requires_grad and attention.pays(q):
        return attention.causal_attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
