"""Our operations of Transformer layers in the place of Megatron-Core's, which are made for GPUs (on a CPU).

Megatron's are compiled by torch or by Transformer Engine there; in plain torch they take several passes over memory,
and autograd keeps what lies between. The implementations are handed in, because the platform lies below the kernels.
"""

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from megatron_ext.platform.replacements import replace

REASON = "fewer passes over memory, with a backward by hand (on CPU)"


class Kernels(Protocol):
    """Functions with Megatron's signatures; see `ops/transformer_api.py`."""

    bias_swiglu_impl: Any
    weighted_bias_swiglu_impl: Any
    apply_rotary: Any
    rms_norm: Any
    causal_attention: Any


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The root-mean-square norm over the last dimension; `install` replaces it."""
    return F.rms_norm(x, weight.shape, weight, eps)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Of queries (b, n, s, d) to keys and values (b, g, s, d) of the same positions; `install` replaces it."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


def install(kernels: Kernels) -> None:
    """Let Megatron's MLPs and attention call `kernels`."""
    import sys

    import megatron.core.models.common.embeddings.rope_utils as rope_utils
    import megatron.core.transformer.mlp as mlp
    import megatron.core.transformer.moe.experts as experts
    import megatron.core.transformer.moe.shared_experts as shared_experts

    for module in (mlp, shared_experts):
        replace(module, "bias_swiglu_impl", kernels.bias_swiglu_impl, REASON)
    for module in (mlp, experts):
        replace(module, "weighted_bias_swiglu_impl", kernels.weighted_bias_swiglu_impl, REASON)
    replace(rope_utils, "_apply_rotary_pos_emb_bshd", kernels.apply_rotary, REASON)
    replace(sys.modules[__name__], "rms_norm", kernels.rms_norm, REASON)
    replace(sys.modules[__name__], "causal_attention", kernels.causal_attention, REASON)
