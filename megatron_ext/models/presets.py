"""Named architectures: the published ones, exactly, and tiny ones for a CPU.

A preset's vocabulary is the published one with its padding; a tokenizer in use may override it.
"""

from dataclasses import dataclass, replace

from megatron_ext.errors import ConfigError, nearest
from megatron_ext.models.architecture import Architecture


@dataclass(frozen=True)
class Preset:
    """A named architecture.

    Attributes:
        architecture: The model.
        source: Where it is described, one line.
        parameters: The published number of parameters, as published: `"8.27B"`.
        non_embedding: The published number without word embedding and output layer, where there is one.
    """

    architecture: Architecture
    source: str
    parameters: str
    non_embedding: str | None = None


_LLAMA_31_8B = Architecture(
    pattern="*-" * 32,
    hidden_size=4096,
    padded_vocab_size=128_256,
    max_position_embeddings=131_072,
    ffn_hidden_size=14_336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    mamba_num_heads=128,
    position_embedding_type="rope",
    rotary_base=500_000,
    rope_scaling_factor=8.0,
)

_MISTRAL_NEMO_12B = replace(
    _LLAMA_31_8B,
    pattern="*-" * 40,
    hidden_size=5120,
    padded_vocab_size=131_072,
    rotary_base=1_000_000,
    rope_scaling_factor=None,
)

# The study's Transformer and Nemotron-4 are the same design: squared ReLU, LayerNorm-1p, RoPE on half of the channels.
_TRANSFORMER_8B = Architecture(
    pattern="*-" * 32,
    hidden_size=4096,
    padded_vocab_size=256_000,
    max_position_embeddings=4096,
    ffn_hidden_size=16_384,
    gated_linear_unit=False,
    activation="squared_relu",
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=128,
    mamba_num_heads=128,
    normalization="LayerNorm",
    zero_centered_norm=True,
    position_embedding_type="rope",
    rotary_percent=0.5,
)

_HYBRID_8B = Architecture(
    pattern="M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-",
    hidden_size=4096,
    padded_vocab_size=256_000,
    max_position_embeddings=4096,
    ffn_hidden_size=16_384,
    gated_linear_unit=False,
    activation="gelu",
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    mamba_num_heads=128,
)

_NEMOTRON_H_8B = Architecture(
    pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    hidden_size=4096,
    padded_vocab_size=131_072,
    max_position_embeddings=8192,
    ffn_hidden_size=21_504,
    gated_linear_unit=False,
    activation="squared_relu",
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    mamba_num_heads=128,
)

_TINY_HYBRID = Architecture(
    pattern="M-M-*-M-M-*-",
    hidden_size=256,
    padded_vocab_size=4096,
    max_position_embeddings=1024,
    ffn_hidden_size=512,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=32,
    mamba_num_heads=16,
    mamba_head_dim=32,
    mamba_state_dim=32,
    mamba_num_groups=2,
    untie_embeddings_and_output_weights=False,
)

_STUDY = "An Empirical Study of Mamba-based Language Models, arXiv 2406.07887, released configuration"
_MINITRON = "Compact Language Models via Pruning and Knowledge Distillation, arXiv 2407.14679, table of architectures"
_PRACTICE = "LLM Pruning and Distillation in Practice, arXiv 2408.11796, table of architectures"
_MINITRON_SSM = "Efficient Hybrid Language Model Compression through Group-Aware SSM Pruning, arXiv 2504.11409"
_TINY = "a few minutes' training on a CPU; as many parameters as the other tiny ones"

PRESETS: dict[str, Preset] = {
    "transformer-8b": Preset(_TRANSFORMER_8B, _STUDY, "8.54B"),
    "mamba2-8b": Preset(replace(_HYBRID_8B, pattern="M" * 56), _STUDY, "8.24B"),
    "mamba2-hybrid-8b": Preset(_HYBRID_8B, _STUDY, "8.65B"),
    "llama3.1-8b": Preset(_LLAMA_31_8B, "The Llama 3 Herd of Models, arXiv 2407.21783, and its model card", "8.03B"),
    "mistral-nemo-12b": Preset(_MISTRAL_NEMO_12B, "Mistral NeMo 12B model card, mistral.ai/news/mistral-nemo", "12.2B"),
    "nemotron-4-15b": Preset(
        replace(
            _TRANSFORMER_8B, hidden_size=6144, ffn_hidden_size=24_576, num_attention_heads=48, num_query_groups=8
        ),
        _MINITRON, "15.6B",
    ),
    "minitron-8b": Preset(
        replace(_TRANSFORMER_8B, num_attention_heads=48, num_query_groups=8), _MINITRON, "8.27B"
    ),
    "minitron-4b": Preset(
        replace(
            _TRANSFORMER_8B, hidden_size=3072, ffn_hidden_size=9216, num_attention_heads=24, num_query_groups=8
        ),
        _MINITRON, "4.19B",
    ),
    "llama3.1-minitron-4b-width": Preset(
        replace(_LLAMA_31_8B, hidden_size=3072, ffn_hidden_size=9216), _PRACTICE, "4.5B", "3.7B"
    ),
    "llama3.1-minitron-4b-depth": Preset(replace(_LLAMA_31_8B, pattern="*-" * 16), _PRACTICE, "4.5B", "3.5B"),
    "mn-minitron-8b": Preset(
        replace(_MISTRAL_NEMO_12B, hidden_size=4096, ffn_hidden_size=11_520, max_position_embeddings=8192),
        _PRACTICE, "8.4B", "7.3B",
    ),
    "nemotron-h-8b": Preset(_NEMOTRON_H_8B, "Nemotron-H, arXiv 2504.03624, and its released configuration", "8B"),
    "nemotron-h-4b": Preset(
        replace(_NEMOTRON_H_8B, hidden_size=3072, ffn_hidden_size=12_288, mamba_num_heads=112), _MINITRON_SSM, "4B"
    ),
    "tiny-transformer": Preset(
        replace(_TINY_HYBRID, pattern="*-" * 6, ffn_hidden_size=768, position_embedding_type="rope"), _TINY, "5.6M"
    ),
    "tiny-mamba2": Preset(replace(_TINY_HYBRID, pattern="M" * 10), _TINY, "5.4M"),
    "tiny-hybrid": Preset(_TINY_HYBRID, _TINY, "5.5M"),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ConfigError: There is none; names the nearest.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}", legal=nearest(name, PRESETS))
    return PRESETS[name]
