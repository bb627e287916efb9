"""`Olmo2ForCausalLM`: norms after sub-layers instead of before, and over all heads of queries, and of keys."""

from megatron_ext.checkpoint.huggingface.config_mappings import Fixed, Renamed, Required, Rope, Tied
from megatron_ext.checkpoint.huggingface.family import Family
from megatron_ext.checkpoint.huggingface.llama import ATTENTION, EMBEDDINGS, FINAL_NORM, GATED, GATED_MLP, sizes
from megatron_ext.checkpoint.huggingface.mappings import ParamMapping

_NORMS = [
    ParamMapping("*", "self_attn.q_norm.weight", "self_attention.q_layernorm.heads_weight"),
    ParamMapping("*", "self_attn.k_norm.weight", "self_attention.k_layernorm.heads_weight"),
    ParamMapping("*", "post_attention_layernorm.weight", "post_norm.weight"),
    ParamMapping("-", "post_feedforward_layernorm.weight", "post_norm.weight"),
]
_PRODUCTS = [mapping for mapping in (*ATTENTION, *GATED_MLP) if "norm" not in mapping.megatron]

OLMO2 = Family(
    "Olmo2ForCausalLM", "olmo2", "model.layers.{}", "*-",
    [*EMBEDDINGS, *_PRODUCTS, *_NORMS, *FINAL_NORM],
    [*sizes(2048), *GATED, Renamed("rms_norm_eps", "norm_epsilon", 1e-5), Rope(), Tied(),
     Required("attention_bias", False),
     Fixed(add_bias_linear=False, pre_norm=False, post_norm=True, qk_layernorm_of_all_heads=True)],
)  # fmt: skip
