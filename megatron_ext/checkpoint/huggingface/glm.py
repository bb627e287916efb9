"""`GlmForCausalLM` (GLM-4-9B) and `Glm4ForCausalLM` (GLM-4-0414), which has norms after its sub-layers, too.

Half of the channels of a head are rotated, neighbours together; gate and up projection are one tensor.
"""

from typing import Any

from megatron_ext.checkpoint.huggingface.config_mappings import Fixed, Renamed, Rope, Tied
from megatron_ext.checkpoint.huggingface.family import Family
from megatron_ext.checkpoint.huggingface.llama import ATTENTION, EMBEDDINGS, FINAL_NORM, GATED, QKV_BIAS, sizes
from megatron_ext.checkpoint.huggingface.mappings import ParamMapping
from megatron_ext.checkpoint.huggingface.phi3 import FUSED_MLP

_POST_NORMS = [
    ParamMapping("*", "post_self_attn_layernorm.weight", "post_norm.weight"),
    ParamMapping("-", "post_mlp_layernorm.weight", "post_norm.weight"),
]
_CONFIG: list[Any] = [
    *sizes(131_072, 2), Renamed("head_dim", "kv_channels", 128), *GATED,
    Renamed("rms_norm_eps", "norm_epsilon", 1.5625e-7), Rope(0.5, partial=True, interleaved=True), Tied(),
    Fixed(add_bias_linear=False), Renamed("attention_bias", "add_qkv_bias", True),
]  # fmt: skip
_PARAMS = [*EMBEDDINGS, *ATTENTION, *QKV_BIAS, *FUSED_MLP, *FINAL_NORM]

GLM = Family("GlmForCausalLM", "glm", "model.layers.{}", "*-", _PARAMS, _CONFIG)
GLM4 = Family(
    "Glm4ForCausalLM", "glm4", "model.layers.{}", "*-",
    [*_PARAMS, *_POST_NORMS], [*_CONFIG, Fixed(post_norm=True)],
)  # fmt: skip
