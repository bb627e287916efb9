"""`NemotronForCausalLM`: Nemotron-3, Nemotron-4 and Minitron (squared ReLU, LayerNorm-1p, RoPE on half of a head)."""

from megatron_ext.checkpoint.huggingface.family import Family, Link
from megatron_ext.checkpoint.huggingface.llama import ATTENTION, EMBEDDINGS, FINAL_NORM, QKV_BIAS, sizes
from megatron_ext.checkpoint.huggingface.settings import Always, Biases, Only, Rope, Same, Tied

_NORM_BIASES = [
    Link("*", "input_layernorm.bias", "self_attention.linear_qkv.layer_norm_bias"),
    Link("-", "post_attention_layernorm.bias", "mlp.linear_fc1.layer_norm_bias"),
    Link("", "model.norm.bias", "decoder.final_norm.bias"),
]
_MLP = [
    Link("-", "post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    Link("-", "mlp.up_proj.weight", "mlp.linear_fc1.weight"),
    Link("-", "mlp.down_proj.weight", "mlp.linear_fc2.weight"),
    Link("-", "mlp.up_proj.bias", "mlp.linear_fc1.bias"),
    Link("-", "mlp.down_proj.bias", "mlp.linear_fc2.bias"),
]

NEMOTRON = Family(
    "NemotronForCausalLM", "nemotron", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *QKV_BIAS, Link("*", "self_attn.o_proj.bias", "self_attention.linear_proj.bias"),
     *_MLP, *_NORM_BIASES, *FINAL_NORM],
    [*sizes(4096), Same("norm_eps", "norm_epsilon", 1e-5), Only("hidden_act", "relu2"),
     Always(activation="squared_relu", gated_linear_unit=False, normalization="LayerNorm", zero_centered_norm=True),
     Rope(percent=0.5, partial=True), Tied(), Biases(("attention_bias", "mlp_bias"))],
)  # fmt: skip
