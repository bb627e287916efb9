"""`NemotronForCausalLM`: Nemotron-3, Nemotron-4 and Minitron (squared ReLU, LayerNorm-1p, RoPE on half of a head)."""

from megatron_ext.checkpoint.huggingface.config_mappings import Biases, Fixed, Renamed, Required, Rope, Tied
from megatron_ext.checkpoint.huggingface.family import Family
from megatron_ext.checkpoint.huggingface.llama import ATTENTION, EMBEDDINGS, FINAL_NORM, QKV_BIAS, sizes
from megatron_ext.checkpoint.huggingface.mappings import ParamMapping

_NORM_BIASES = [
    ParamMapping("*", "input_layernorm.bias", "self_attention.linear_qkv.layer_norm_bias"),
    ParamMapping("-", "post_attention_layernorm.bias", "mlp.linear_fc1.layer_norm_bias"),
    ParamMapping("", "model.norm.bias", "decoder.final_norm.bias"),
]
_MLP = [
    ParamMapping("-", "post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ParamMapping("-", "mlp.up_proj.weight", "mlp.linear_fc1.weight"),
    ParamMapping("-", "mlp.down_proj.weight", "mlp.linear_fc2.weight"),
    ParamMapping("-", "mlp.up_proj.bias", "mlp.linear_fc1.bias"),
    ParamMapping("-", "mlp.down_proj.bias", "mlp.linear_fc2.bias"),
]

NEMOTRON = Family(
    "NemotronForCausalLM", "nemotron", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *QKV_BIAS, ParamMapping("*", "self_attn.o_proj.bias", "self_attention.linear_proj.bias"),
     *_MLP, *_NORM_BIASES, *FINAL_NORM],
    [*sizes(4096), Renamed("norm_eps", "norm_epsilon", 1e-5), Required("hidden_act", "relu2"),
     Fixed(activation="squared_relu", gated_linear_unit=False, normalization="LayerNorm", zero_centered_norm=True),
     Rope(percent=0.5, partial=True), Tied(), Biases(("attention_bias", "mlp_bias"))],
)  # fmt: skip
