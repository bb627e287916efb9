"""One builder for Transformer, Mamba-2 and hybrid models: a layer pattern on Megatron's `HybridModel`."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.training.argument_utils import core_transformer_config_from_args, hybrid_config_from_args
from megatron.training.models import HybridModelConfig
from megatron.training.models.hybrid import HybridModelBuilder

from megatron_ext.models.architecture import Architecture
from megatron_ext.models.specs import stack_spec


@dataclass(kw_only=True)
class PatternModelConfig(HybridModelConfig):
    """Megatron's hybrid configuration plus what `HybridModel` cannot say itself."""

    builder: ClassVar[str] = "megatron_ext.models.builder.PatternModelBuilder"
    rope_scaling_factor: float | None = None
    """Llama 3.1's frequency scaling of RoPE; None for plain RoPE."""


class PatternModelBuilder(HybridModelBuilder):
    """Builds one pipeline stage, then replaces what `HybridModel` has no argument for."""

    def build_model(self, pg_collection: Any, *args: Any, **kwargs: Any) -> HybridModel:
        """One stage of the model, on `pg_collection`'s groups."""
        model = super().build_model(pg_collection, *args, **kwargs)
        config: Any = self._model_config
        if config.rope_scaling_factor is not None:
            transformer = config.transformer
            model.rotary_pos_emb = RotaryEmbedding(
                kv_channels=transformer.kv_channels,
                rotary_percent=config.rotary_percent,
                rotary_base=config.rotary_base,
                rope_scaling=True,
                rope_scaling_factor=config.rope_scaling_factor,
                use_cpu_initialization=transformer.use_cpu_initialization,
                cp_group=pg_collection.cp,
            )
        return model


def model_config(args: Namespace, architecture: Architecture) -> PatternModelConfig:
    """The configuration that builds `architecture`, with everything else (dtype, layout, fusions) from `args`.

    Args:
        args: Megatron's validated namespace. The pipeline borders are those of its `hybrid_layer_pattern` if that
            is the same model, and even ones otherwise (a teacher beside its student).
    """
    own = args
    if Architecture.from_args(args) != architecture:
        own = with_architecture(args, architecture)
    config = hybrid_config_from_args(own, core_transformer_config_from_args(own), PatternModelConfig)
    config.vocab_size, config.should_pad_vocab = architecture.padded_vocab_size, False
    config.rope_scaling_factor = architecture.rope_scaling_factor
    config.hybrid_stack_spec = stack_spec(architecture) or config.hybrid_stack_spec
    return config


def with_architecture(args: Namespace, architecture: Architecture) -> Namespace:
    """A copy of `args` that describes another model on the same layout."""
    stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    pattern = architecture.layers if stages == 1 else architecture.layers.split(stages)
    return Namespace(**vars(args) | architecture.to_args() | {"hybrid_layer_pattern": str(pattern)})
