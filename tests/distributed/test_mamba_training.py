"""The norm of a Mamba-2 layer in one operation with its scan is Megatron's own sequence of operations."""

from typing import Any

import torch
from run_ranks import run_ranks
from torch import Tensor

from tests.distributed.test_importance import ARCH, SEQUENCE, random_checkpoint, tokens


def gradients(checkpoint: str, save: str) -> dict[str, tuple[float, dict[str, Tensor], int]]:
    """Loss, gradients and calls of the fused function with the norm inside and, because someone listens, outside."""
    from megatron_ext.pruning.job import JOB
    from megatron_ext.training.command_line import parse_command_line

    flags = ["--load", checkpoint, "--save", save, "--mock-data", "--tokenizer-type", "NullTokenizer"]
    flags += ["--vocab-size", "63", "--seq-length", str(SEQUENCE), "--global-batch-size", "2"]
    started = parse_command_line(JOB, [*flags, "--micro-batch-size", "2"])
    from megatron.core.utils import unwrap_model

    from megatron_ext.ops import mamba_ssm_api
    from megatron_ext.training.forward import load_model

    (model,) = unwrap_model(load_model(started))
    model.train().requires_grad_()
    norms = [layer.mixer.norm for layer, unit in zip(model.decoder.layers, ARCH.pattern, strict=True) if unit == "M"]
    micro, positions, heard = tokens()[:2], torch.arange(SEQUENCE)[None], []
    found: dict[str, Any] = {}
    for name in ("inside", "outside"):
        if name == "outside":
            for norm in norms:
                norm.register_forward_hook(lambda *_: heard.append(1))
        model.zero_grad()
        loss = model(micro, positions, None, labels=micro.roll(-1, 1)).double().mean()
        loss.backward()
        own = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[name] = (loss.item(), own, len(heard))
    assert isinstance(norms[0], mamba_ssm_api.RMSNorm)
    return found


def test_norm_inside_and_outside(tmp_path) -> None:
    random_checkpoint(tmp_path / "model")
    (found,) = run_ranks(gradients, 1, str(tmp_path / "model"), str(tmp_path / "out"))
    (loss, inside, unheard), (expected, outside, heard) = found["inside"], found["outside"]
    assert (unheard, heard) == (0, ARCH.pattern.count("M")), "the norm is called by itself only where a hook listens"
    assert abs(loss - expected) < 1e-6
    assert inside.keys() == outside.keys()
    assert any("norm.weight" in name for name in inside)
    for name, gradient in outside.items():
        torch.testing.assert_close(
            inside[name], gradient, rtol=2e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
