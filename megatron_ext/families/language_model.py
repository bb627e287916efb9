"""The family of language models: a layer pattern on Megatron's `HybridModel`.

The model comes from `--preset` (a name, or a checkpoint whose architecture is taken), from the checkpoint to be
loaded, or from Megatron's own flags.
"""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.resume import architecture_on_disk, sequence_length_on_disk
from megatron_ext.checkpoint.start import Start
from megatron_ext.errors import ConfigError
from megatron_ext.families.family import ModelFamily
from megatron_ext.models import training_cost
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.argument_mappings import Argument
from megatron_ext.models.megatron_args import TABLE, arguments, own_arguments
from megatron_ext.models.pattern import MAMBA, MOE
from megatron_ext.models.pattern import parse as parse_pattern
from megatron_ext.models.presets import preset
from megatron_ext.models.rope_extension import extension
from megatron_ext.ops.autotune import Shape
from megatron_ext.platform.device import device_name


class LayerPatternFamily(ModelFamily):
    """Transformer, Mamba-2 and hybrid language models; a model is an `Architecture`."""

    name = "language-model"
    reads_text = True

    def flags(self, early: Namespace, start: Start | None) -> tuple[list[str], str]:
        """Of a preset, or of the step to load unless the command line has a pattern of its own."""
        if early.hybrid_layer_pattern is not None:
            parse_pattern(early.hybrid_layer_pattern)
        return model_flags(early, start)

    def add_flags(self, parser: ArgumentParser) -> None:
        """What Megatron's flags cannot say."""
        for argument in own_arguments():
            argument.add_to(parser)

    def early_arguments(self) -> Sequence[Argument]:
        """Those of the table."""
        return arguments()

    def ssm_shape(self, early: Namespace) -> Shape | None:
        """A Mamba-2 layer on one rank."""
        if MAMBA not in (early.hybrid_layer_pattern or ""):
            return None
        # Under context parallelism a rank has the whole sequence of some heads, and at least one group.
        ranks = early.tensor_model_parallel_size * early.context_parallel_size
        known = early.mamba_num_heads or early.hidden_size
        heads = TABLE["mamba_num_heads"].read(early) if known else Shape.heads
        width, states, groups = (TABLE[f"mamba_{name}"].read(early) for name in ("head_dim", "state_dim", "num_groups"))
        return Shape(
            max(1, heads // ranks), width, states, max(1, groups // ranks), early.seq_length or Shape.tokens,
            "bfloat16" if early.bf16 else "float16" if early.fp16 else "float32",
            early.micro_batch_size, norm_apart=early.context_parallel_size > 1,
        ).limited()  # fmt: skip

    def check(self, args: Namespace, loads: bool) -> None:
        """Borders of the pipeline are set, where the user gave none."""
        if args.hybrid_layer_pattern is None:
            empty = f"--load {args.load}, where no checkpoint is" if args.load else "none of the flags"
            named = "--preset NAME, --preset CHECKPOINT, or --hybrid-layer-pattern"
            raise ConfigError("no model given", got=empty, legal="--load CHECKPOINT" if loads else named)
        args.hybrid_layer_pattern = _pipeline(args.hybrid_layer_pattern, args.pipeline_model_parallel_size)
        if args.cross_entropy_loss_fusion and args.cross_entropy_fusion_impl == "native" and not args.bf16:
            raise ConfigError(
                "Megatron's fused cross entropy rounds the gradient of every logit to bfloat16",
                got="--cross-entropy-loss-fusion without --bf16", legal="both of them, or neither",
            )  # fmt: skip
        layers = len(parse_pattern(args.hybrid_layer_pattern).units)
        if args.num_layers not in (None, layers):
            raise ConfigError("--num-layers is not the pattern's", got=args.num_layers, legal=f"{layers}, or none")
        if args.padded_vocab_size is None and args.vocab_size is None:
            return  # the tokenizer will say
        self.check_layout(args, Architecture.from_args(args))

    def from_args(self, args: Namespace) -> Architecture:
        """All of it from Megatron's arguments; the tokenizer may have decided the vocabulary."""
        return Architecture.from_args(args)

    def with_model(self, args: Namespace, model: Architecture) -> Namespace:
        """Its sizes as Megatron's arguments, and even borders of the pipeline."""
        from megatron_ext.models.builder import with_architecture

        return with_architecture(args, model)

    def check_layout(self, args: Namespace, model: Architecture) -> None:
        """Every size that the layout divides."""
        tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size
        model.validate(tp=tp, pp=pp, ep=ep, etp=etp)
        if MOE in model.pattern and tp > 1 and not args.sequence_parallel:
            # Otherwise every tensor rank sends the same tokens to the experts.
            raise ConfigError(
                f"experts under tensor parallel {tp} need sequence parallelism", legal="--sequence-parallel"
            )

    def config(self, args: Namespace, model: Architecture) -> Any:
        """That of the layer pattern, whose losses need no logits where that is faster."""
        from megatron_ext.lm_head.token_losses import attach
        from megatron_ext.models.builder import model_config

        def attach_losses(chunks: list[Any]) -> list[Any]:
            for chunk in chunks:
                attach(chunk)
            return chunks

        config = model_config(args, model)
        config.pre_wrap_hooks = [*config.pre_wrap_hooks, attach_losses]
        return config

    def rows(self, args: Namespace, model: Architecture) -> dict[str, str]:
        """Pattern, sizes and parameters."""
        total, body = model.num_parameters(), model.num_parameters(embedding=False)
        active = f", of which a token uses {model.num_active_parameters():,}" if model.num_experts else ""
        return {
            "pattern": args.hybrid_layer_pattern,
            "sizes": f"hidden {model.hidden_size:,}, FFN {model.ffn_hidden_size:,}, "
            f"vocabulary {model.padded_vocab_size:,}, "
            f"{model.num_attention_heads} heads in {model.num_query_groups} groups",
            "parameters": f"{total:,} ({total / 1e9:.2f}B), without embeddings {body:,}{active}",
        }

    def memory(self, model: Architecture, layout: training_cost.Layout) -> dict[str, float]:
        """As `training_cost.memory` counts."""
        return training_cost.memory(model, layout)

    def share_of_peak(self, model: Architecture, args: Namespace) -> float | None:
        """By the operations of `training_cost`, forward and backward, a teacher's apart, and the peak of its GPUs."""
        peak = training_cost.peak(device_name(), half=args.bf16 or args.fp16)
        if peak is None:
            return None
        return training_cost.training_flops_per_token(model, args.seq_length) / (args.world_size * peak)


LANGUAGE_MODEL = LayerPatternFamily()


def _pipeline(pattern: str, stages: int) -> str:
    """The pattern with pipeline borders, chosen evenly between blocks where the user gave none."""
    parsed = parse_pattern(pattern)
    if stages == 1 or parsed.borders:
        return str(parsed)
    return str(parsed.split(stages))


def architecture_of(source: str) -> tuple[Architecture, bool]:
    """The architecture of a preset or a checkpoint directory, and whether it came from a checkpoint.

    Raises:
        ConfigError: It is neither.
        CheckpointError: The directory holds no readable checkpoint.
    """
    if os.sep in source or Path(source).is_dir():
        return architecture_on_disk(Path(source)), True
    return preset(source).architecture, False


def model_flags(early: Namespace, start: Start | None) -> tuple[list[str], str]:
    """Flags of the model that `--preset` or the step to load names, and where they came from."""
    source, step = early.preset, None
    if source is None and start is not None:
        # A pattern on the command line may add pipeline borders to the checkpoint's own; another one is another model.
        units, pattern = layout.architecture(start.step.path).pattern, early.hybrid_layer_pattern
        if pattern is None or parse_pattern(pattern).units == units:
            source, step = str(start.directory), start.step.path
    if source is None:
        return [], "flags"
    architecture, from_checkpoint = architecture_of(source if step is None else str(step.absolute()))
    # A preset's vocabulary is only its default: the tokenizer in use decides.
    by_tokenizer = not from_checkpoint and (early.tokenizer_model or early.tokenizer_type)
    flags = architecture.to_flags(but=("padded_vocab_size",) if by_tokenizer else ())
    if from_checkpoint:
        flags += extension(architecture, early)
        if length := sequence_length_on_disk(step or Path(source)):
            flags += ["--seq-length", str(length)]
    return flags, source
