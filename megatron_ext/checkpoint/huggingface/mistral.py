"""`MistralForCausalLM`: Mistral 7B and Mistral NeMo."""

from megatron_ext.checkpoint.huggingface.config_mappings import Fixed, Rope, Tied
from megatron_ext.checkpoint.huggingface.family import Family
from megatron_ext.checkpoint.huggingface.llama import ATTENTION, EMBEDDINGS, FINAL_NORM, GATED, GATED_MLP, sizes
from megatron_ext.checkpoint.huggingface.windows import Window

MISTRAL = Family(
    "MistralForCausalLM", "mistral", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *GATED_MLP, *FINAL_NORM],
    [*sizes(131_072, 8), *GATED, Rope(), Tied(), Window(131_072), Fixed(add_bias_linear=False)],
)  # fmt: skip
