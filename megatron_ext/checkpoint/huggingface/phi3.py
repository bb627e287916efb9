"""`Phi3ForCausalLM`: Phi-3, 3.5 and 4 (query, key and value in one tensor, gate and up projection in another)."""

from megatron_ext.checkpoint.huggingface.config_mappings import Fixed, Renamed, Rope, Tied
from megatron_ext.checkpoint.huggingface.family import Family
from megatron_ext.checkpoint.huggingface.llama import ATTENTION, EMBEDDINGS, FINAL_NORM, GATED, sizes
from megatron_ext.checkpoint.huggingface.mappings import ParamMapping, fused_qkv_mapping
from megatron_ext.checkpoint.huggingface.windows import Window

_ATTENTION = [
    *(mapping for mapping in ATTENTION if mapping.megatron != "self_attention.linear_qkv.weight"),
    *fused_qkv_mapping("self_attn.qkv_proj.weight", "self_attention.linear_qkv.weight"),
]
FUSED_MLP = [
    ParamMapping("-", "post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ParamMapping("-", "mlp.gate_up_proj.weight", "mlp.linear_fc1.weight"),
    ParamMapping("-", "mlp.down_proj.weight", "mlp.linear_fc2.weight"),
]

PHI3 = Family(
    "Phi3ForCausalLM", "phi3", "model.layers.{}", "*-",
    [*EMBEDDINGS, *_ATTENTION, *FUSED_MLP, *FINAL_NORM],
    [*sizes(4096), *GATED, Renamed("rms_norm_eps", "norm_epsilon", 1e-5), Rope(partial=True, original=4096), Tied(),
     Window(4096, missing=None), Fixed(add_bias_linear=False)],
)  # fmt: skip
