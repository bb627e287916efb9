"""`Qwen2ForCausalLM` (1.5 to 2.5: biases on query, key and value) and `Qwen3ForCausalLM` (norms on query and key)."""

from typing import Any

from megatron_ext.checkpoint.huggingface.config_mappings import Fixed, Renamed, Required, Rope, Tied
from megatron_ext.checkpoint.huggingface.family import Family
from megatron_ext.checkpoint.huggingface.llama import (
    ATTENTION,
    EMBEDDINGS,
    FINAL_NORM,
    GATED,
    GATED_MLP,
    QKV_BIAS,
    sizes,
)
from megatron_ext.checkpoint.huggingface.mappings import ParamMapping
from megatron_ext.checkpoint.huggingface.windows import Window, upper_layers

_SHARED: list[Any] = [
    *GATED, Rope(), Tied(), Window(32_768, switch="use_sliding_window", kinds=upper_layers, by_layer=True),
    Fixed(add_bias_linear=False),
]  # fmt: skip
QK_NORMS = [
    ParamMapping("*", "self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
    ParamMapping("*", "self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
]

QWEN2 = Family(
    "Qwen2ForCausalLM", "qwen2", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *QKV_BIAS, *GATED_MLP, *FINAL_NORM],
    [*sizes(32_768, 32), *_SHARED, Fixed(add_qkv_bias=True)],
)  # fmt: skip
QWEN3 = Family(
    "Qwen3ForCausalLM", "qwen3", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *QK_NORMS, *GATED_MLP, *FINAL_NORM],
    [*sizes(32_768, 32), Renamed("head_dim", "kv_channels", 128), *_SHARED, Required("attention_bias", False),
     Fixed(qk_layernorm=True)],
)  # fmt: skip
