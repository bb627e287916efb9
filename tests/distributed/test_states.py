"""A student beside its teacher against both models' formulas in float64: losses, gradients, and whom these reach."""

import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_models import random_weights
from run_ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.checkpoint.writer import writing
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.reference import forward, mask, rms_norm

TEACHER = Architecture(
    pattern="M-*-MM-", hidden_size=32, padded_vocab_size=64, max_position_embeddings=32, ffn_hidden_size=48,
    num_attention_heads=4, num_query_groups=2, kv_channels=8, mamba_num_heads=4, mamba_head_dim=8, mamba_state_dim=8,
    mamba_num_groups=2,
)  # fmt: skip
STUDENT = replace(TEACHER, pattern="M*-", hidden_size=24, ffn_hidden_size=40)
PAIRS = {
    "embedding:embedding": (("input", 0), ("input", 0)),
    "1:4": (("output", 1), ("output", 4)),
    "norm2:norm3": (("norm", 2), ("norm", 3)),
    "final:final": (None, None),
}
SEQUENCE, WEIGHT = 24, 0.7
DATA = torch.Generator().manual_seed(8)
TOKENS, LABELS = (torch.randint(64, (2, SEQUENCE), generator=DATA) for _ in range(2))
MASK = torch.rand(2, SEQUENCE, generator=DATA)


class Waits(TorchDispatchMode):
    """Where a value is asked for on the host, or a size that depends on values: on a GPU, both wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.name().startswith("aten::index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for each in args
            if isinstance(each, list | tuple)
            for index in each
        )
        if by_mask or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            ours = [frame for frame in traceback.extract_stack() if "/megatron" in frame.filename]
            self.found += [f"{func.name()} in {ours[-1]}"]
        return func(*args, **(kwargs or {}))


def model_of(folder: str, *more: str) -> tuple[Any, Any]:
    """The student beside its teacher, and what is trained beside them."""
    from megatron_ext.distillation.job import JOB, check
    from megatron_ext.training.command_line import parse_command_line

    flags = ["--pretrained-checkpoint", f"{folder}/student", "--distill-teacher", f"{folder}/teacher", "--mock-data"]
    flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "63", "--seq-length", str(SEQUENCE), "--lr", "1e-3"]
    flags += ["--global-batch-size", "2", "--micro-batch-size", "2", "--train-iters", "2", "--distill-states", *PAIRS]
    flags += more
    started = parse_command_line(JOB, flags)
    teacher: Any = check(started)
    from megatron.core.utils import unwrap_model

    from megatron_ext.distillation.setup import Setup
    from megatron_ext.training.extra_models import ExtraModels
    from megatron_ext.training.forward import load_model

    setup = Setup(started, teacher, started.options["distill"])
    students = unwrap_model(load_model(started))
    (model,) = setup.hook(ExtraModels(setup.extra_models(), started.args, None).build(students))
    return model, setup


def waits(folder: str, divergence: str) -> list[str]:
    """Where a micro-batch of a training waits for a GPU, forward or backward."""
    model, setup = model_of(folder, "--distill-loss", divergence, "--distill-top-k", "5")
    ids = torch.zeros(2, 2, dtype=torch.long)
    with Waits() as seen:
        losses = model(TOKENS, torch.arange(SEQUENCE)[None], None, labels=LABELS, loss_mask=MASK, sample_id=ids)
        losses.total.backward()
    within = list(seen.found)
    with seen:
        setup.check()
    assert len(seen.found) == len(within) + 1, "once a step"
    return within


def measured(folder: str, distance: str) -> dict[str, Any]:
    """What the product makes of a micro-batch."""
    from megatron_ext.distillation.setup import PROJECTIONS
    from megatron_ext.training.extra_models import beside

    model, _ = model_of(folder, "--distill-states-loss", distance, "--distill-states-weight", str(WEIGHT))
    inputs = (TOKENS, torch.arange(SEQUENCE)[None], None)
    ids = torch.zeros(2, 2, dtype=torch.long)
    losses = model(*inputs, labels=LABELS, loss_mask=MASK, sample_id=ids)
    losses.total.backward()
    projections = beside(model.module)[PROJECTIONS]
    maps = {i: projections.get_parameter(name) for i, name in projections._names.items()}
    return {
        "total": losses.total.detach(), "parts": {name: value.T.detach() for name, value in losses.parts.items()},
        "gradients": {name: value.grad for name, value in model.module.named_parameters()},
        "maps": {i: (weight.detach(), weight.grad) for i, weight in maps.items()},
        "reached": [name for name, value in model.teacher.chunk.named_parameters() if value.grad is not None],
        "registered": [name for name, _ in model.named_parameters()],
    }  # fmt: skip


def states(arch: Architecture, weights: dict[str, Tensor], side: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the model's side of each pair."""
    logits, seen = forward(arch, weights, TOKENS)
    found = {name: seen[place[side][1]][place[side][0]] for name, place in PAIRS.items() if place[side] is not None}
    whole = mask(None, arch.hidden_size)
    final = rms_norm(seen[-1]["output"], weights["decoder.final_norm.weight"], arch.norm_epsilon, whole)
    return logits, found | {"final:final": final}


def written(folder: Path) -> dict[str, dict[str, Tensor]]:
    """A student and a teacher, and their weights."""
    weights = {"student": random_weights(STUDENT, 1), "teacher": random_weights(TEACHER, 2)}
    for (name, values), arch in zip(weights.items(), (STUDENT, TEACHER), strict=True):
        with writing(folder / name, arch) as writer:
            for key, value in values.items():
                writer.write(key, value.float())
    return weights


@pytest.mark.parametrize("divergence", ["forward-kl", "jsd", "cosine", "top-k"])
def test_a_micro_batch_waits_for_nothing(tmp_path: Path, divergence: str) -> None:
    written(tmp_path)
    (found,) = run_ranks(waits, 1, str(tmp_path), divergence)
    assert found == []


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_losses_and_gradients(tmp_path: Path, distance: str) -> None:
    weights = written(tmp_path)
    (got,) = run_ranks(measured, 1, str(tmp_path), distance)

    own = {key: value.float().double().requires_grad_() for key, value in weights["student"].items()}
    other = {key: value.float().double() for key, value in weights["teacher"].items()}
    (logits, mine), (targets, theirs) = states(STUDENT, own, 0), states(TEACHER, other, 1)
    maps = {i: value.double().requires_grad_() for i, (value, _) in got["maps"].items()}
    # Of 64 entries of the vocabulary one is padding, which the divergence leaves out.
    kd = F.kl_div(*(x[..., :63].log_softmax(-1) for x in (logits, targets)), reduction="none", log_target=True).sum(-1)
    total = (MASK * kd).sum()
    for i, name in enumerate(PAIRS):
        projected = mine[name] @ maps[i].T
        if distance == "mse":
            value = (projected - theirs[name]).square().mean(-1)
        else:
            value = 1 - F.cosine_similarity(projected, theirs[name], dim=-1)
        torch.testing.assert_close(got["parts"][f"states {name} loss"].double(), value, rtol=1e-4, atol=1e-5)
        total = total + WEIGHT * (MASK * value).sum()
    torch.testing.assert_close(got["total"].double(), total, rtol=1e-5, atol=1e-4)

    total.backward()
    for i, (_, gradient) in got["maps"].items():
        torch.testing.assert_close(gradient.double(), maps[i].grad, rtol=1e-3, atol=1e-4)
    same = [key for key in got["gradients"] if key in own]  # Megatron has Mamba's projections in one piece
    assert len(same) > 10
    for key in same:
        torch.testing.assert_close(got["gradients"][key].double(), own[key].grad, rtol=1e-3, atol=1e-3)
    assert got["reached"] == []
    assert all(name.startswith("module.") for name in got["registered"])
