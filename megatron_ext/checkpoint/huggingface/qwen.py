"""`Qwen2ForCausalLM` (1.5 to 2.5: biases on query, key and value) and `Qwen3ForCausalLM` (norms on query and key)."""

from typing import Any

from megatron_ext.checkpoint.huggingface.family import Family, Link
from megatron_ext.checkpoint.huggingface.llama import (
    ATTENTION,
    EMBEDDINGS,
    FINAL_NORM,
    GATED,
    GATED_MLP,
    QKV_BIAS,
    sizes,
)
from megatron_ext.checkpoint.huggingface.mistral import NoWindow
from megatron_ext.checkpoint.huggingface.settings import Always, Only, Rope, Same, Tied

_SHARED: list[Any] = [*GATED, Rope(), Tied(), NoWindow(32_768, "use_sliding_window"), Always(add_bias_linear=False)]
_QK_NORMS = [
    Link("*", "self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
    Link("*", "self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
]

QWEN2 = Family(
    "Qwen2ForCausalLM", "qwen2", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *QKV_BIAS, *GATED_MLP, *FINAL_NORM],
    [*sizes(32_768, 32), *_SHARED, Always(add_qkv_bias=True)],
)  # fmt: skip
QWEN3 = Family(
    "Qwen3ForCausalLM", "qwen3", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *_QK_NORMS, *GATED_MLP, *FINAL_NORM],
    [*sizes(32_768, 32), Same("head_dim", "kv_channels", 128), *_SHARED, Only("attention_bias", False),
     Always(qk_layernorm=True)],
)  # fmt: skip
