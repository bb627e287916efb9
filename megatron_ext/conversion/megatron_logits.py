"""What Megatron's own models say of tokens: the side of `convert --verify` that knows no other form."""

import gc
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.gpt import to_args
from megatron_ext.inference.session import NO_DATA
from megatron_ext.models.megatron_args import REPEATED, functional_arguments
from megatron_ext.reports.megatron_output import suppressed_output
from megatron_ext.training.command_line import parse_command_line
from megatron_ext.training.job import FORWARD_ONLY, Job, RunConfig

JOB = Job("convert", defaults=(*FORWARD_ONLY, *NO_DATA))

# Arguments that belong to a run's layout, or that launching settles from the same arguments.
_OF_THE_RUN = ("hybrid_layer_pattern", *REPEATED, "spec")


@torch.no_grad()
def megatron_logits(checkpoint: Path, inputs: list[Tensor], twin: Path | None = None) -> list[Tensor]:
    """Logits (b, s, v) of Megatron's model in fp32 for each batch of tokens (b, s); starts Megatron in this process.

    Args:
        checkpoint: The model, which is built from the arguments saved with it.
        inputs: The batches.
        twin: The same model as a GPTModel, whose logits are appended.
    """
    length = max(tokens.shape[1] for tokens in inputs)
    flags = ["--load", str(checkpoint), "--seq-length", str(length), "--global-batch-size", "1"]
    started = parse_command_line(JOB, flags)
    from megatron.training.global_vars import set_args

    from megatron_ext.training.forward import load_model

    started = replace(started, args=_as_trained(started.args, checkpoint))
    set_args(started.args)
    with suppressed_output():
        (model,) = load_model(started)
    logits = _logits(model, inputs)
    if twin is not None:
        del model
        gc.collect()
        with suppressed_output():
            (model,) = _load_gpt(started, twin)
        logits += _logits(model, inputs)
    torch.distributed.destroy_process_group()
    return logits


def _logits(model: Any, inputs: list[Tensor]) -> list[Tensor]:
    device = torch.cuda.current_device()
    logits = []
    for tokens in inputs:
        positions = torch.arange(tokens.shape[1], device=device)[None].expand_as(tokens)
        logits.append(model(tokens.to(device), positions, None).float().cpu())
    return logits


def _as_trained(args: Namespace, checkpoint: Path) -> Namespace:
    """Megatron's arguments of a run, but for what changes the function of a model: that is as saved with it."""
    saved = vars(layout.common(layout.find(checkpoint).path)["args"])
    own = {name: saved[name] for name in functional_arguments() if name in saved and name not in _OF_THE_RUN}
    return Namespace(**vars(args) | own)


def _load_gpt(run: RunConfig, checkpoint: Path) -> list[Any]:
    """The same model as Megatron's GPTModel, once `load_model` has started Megatron; free the one before first.

    Args:
        run: The command line that Megatron was started with.
        checkpoint: Its weights, in the GPTModel's form.

    Returns:
        This rank's chunks, in evaluation mode.
    """
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.global_vars import set_args

    from megatron_ext.training.forward import build_model

    args = _as_trained(Namespace(**vars(run.args) | to_args(run.architecture)), checkpoint)
    saved = layout.common(layout.find(checkpoint).path)["args"]
    args.transformer_impl = getattr(saved, "transformer_impl", args.transformer_impl)  # which decides on some names
    args.load, args.pretrained_checkpoint, args.ckpt_step = str(checkpoint), None, None
    set_args(args)
    return build_model(replace(run, args=args), gpt_config_from_args(args))
