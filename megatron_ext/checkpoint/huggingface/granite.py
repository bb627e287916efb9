"""`GraniteForCausalLM`: Granite 3, Llama with four multipliers: of embeddings, attention, residuals and logits."""

from megatron_ext.checkpoint.huggingface.config_mappings import Biases, Renamed, Rope, Tied
from megatron_ext.checkpoint.huggingface.family import Family
from megatron_ext.checkpoint.huggingface.llama import (
    ATTENTION,
    BIASES,
    EMBEDDINGS,
    FINAL_NORM,
    GATED,
    GATED_MLP,
    QKV_BIAS,
    sizes,
)

MULTIPLIERS = [
    Renamed("embedding_multiplier", "embedding_multiplier", 1.0),
    Renamed("attention_multiplier", "softmax_scale", 1.0),
    Renamed("residual_multiplier", "residual_multiplier", 1.0),
    Renamed("logits_scaling", "logits_scaling", 1.0),
]

GRANITE = Family(
    "GraniteForCausalLM", "granite", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *QKV_BIAS, *GATED_MLP, *BIASES, *FINAL_NORM],
    [*sizes(2048), *GATED, Rope(), Tied(), Biases(("attention_bias", "mlp_bias")), *MULTIPLIERS],
)  # fmt: skip
