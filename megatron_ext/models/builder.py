"""One builder for Transformer, Mamba-2 and hybrid models: a layer pattern on Megatron's `HybridModel`."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.training.argument_utils import core_transformer_config_from_args, hybrid_config_from_args
from megatron.training.models import HybridModelConfig
from megatron.training.models.hybrid import HybridModelBuilder
from torch import Tensor

from megatron_ext.models.architecture import Architecture
from megatron_ext.models.rotary import ArchitectureRotaryEmbedding, is_stock, scale_attention
from megatron_ext.models.specs import stack_spec


@dataclass(kw_only=True)
class PatternModelConfig(HybridModelConfig):
    """Megatron's hybrid configuration plus what `HybridModel` cannot say itself."""

    builder: ClassVar[str] = "megatron_ext.models.builder.PatternModelBuilder"
    architecture: Any = None
    """The whole model."""


class PatternModelBuilder(HybridModelBuilder):
    """Builds one pipeline stage, then replaces what `HybridModel` has no argument for."""

    def build_model(self, pg_collection: Any, *args: Any, **kwargs: Any) -> HybridModel:
        """One stage of the model, on `pg_collection`'s groups."""
        config: Any = self._model_config
        config.transformer.qk_layernorm = (
            config.architecture.qk_layernorm or config.architecture.qk_layernorm_of_all_heads
        )
        model = super().build_model(pg_collection, *args, **kwargs)
        # Megatron adds gradients of norms on query and key over tensor ranks, which is right for norms of single heads.
        config.transformer.qk_layernorm = config.architecture.qk_layernorm
        decoder: Any = model.decoder
        own: Architecture = config.architecture
        if own.position_embedding_type == "rope" and not is_stock(own):
            cpu = config.transformer.use_cpu_initialization
            model.rotary_pos_emb = ArchitectureRotaryEmbedding(own, cpu, pg_collection.cp)
            scale_attention(decoder.layers, own)
        if own.embedding_multiplier != 1 and model.pre_process:
            model.embedding.register_forward_hook(_multiply(own.embedding_multiplier))
        model.logits_softcap = own.logits_softcap  # type: ignore[assignment] - for whoever makes logits by parts
        if own.logits_softcap is not None:
            scaled: Any = partial(_softcapped, cap=own.logits_softcap)
            model._scale_logits = scaled
        if own.logits_scaling != 1 and model.post_process:
            # Of the states that logits are made of, so that whoever makes them has it.
            decoder.final_norm.register_forward_hook(_multiply(1 / own.logits_scaling))
        return model


def _softcapped(logits: Tensor, cap: float) -> Tensor:
    """cap tanh(logits / cap)."""
    return cap * (logits / cap).tanh()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _multiply(factor: float) -> Callable[..., Tensor]:
    """A hook that multiplies a module's output."""

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * factor

    return hook


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
    config.architecture = architecture
    config.transformer.softmax_scale = architecture.softmax_scale
    if architecture.activation == "gelu_tanh":
        config.transformer.activation_func, config.transformer.bias_activation_fusion = _gelu_tanh, False
    config.hybrid_stack_spec = stack_spec(architecture) or config.hybrid_stack_spec
    return config


def with_architecture(args: Namespace, architecture: Architecture) -> Namespace:
    """A copy of `args` that describes another model on the same layout."""
    stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    pattern = architecture.layers if stages == 1 else architecture.layers.split(stages)
    return Namespace(**vars(args) | architecture.to_args() | {"hybrid_layer_pattern": str(pattern)})
