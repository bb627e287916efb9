"""What models of other families add to a layer trains the same on tensor-parallel ranks as on one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from random_models import random_weights
from workspace import TRAIN, Workspace

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing

MODELS: dict[str, dict[str, Any]] = {
    "olmo2": {"qk_layernorm_of_all_heads": True},
    "plain": {},
}
STEPS = ["--optimizer", "sgd", "--lr", "0.1", "--min-lr", "0.1", "--train-iters", "2", "--eval-iters", "0"]


@pytest.mark.parametrize("name", list(MODELS))
def test_two_tensor_ranks_take_the_steps_of_one(workspace: Workspace, teacher: str, name: str) -> None:
    step = layout.find(workspace.path / teacher).path
    arch = replace(layout.architecture(step), pattern="*-*-", **MODELS[name])
    source = f"fields-{name}"
    with writing(workspace.path / source, arch, layout.common(step)["args"]) as writer:
        for key, tensor in random_weights(arch).items():
            writer.write(key, tensor.float())
    runs = {1: [], 2: ["--tensor-model-parallel-size", "2", "--sequence-parallel"]}
    for ranks, flags in runs.items():
        words = [*workspace.data, *TRAIN, *STEPS, *flags, "--save", f"{source}-{ranks}"]
        workspace.run("pretrain_hybrid.py", "--pretrained-checkpoint", source, *words, ranks=ranks)
    one, two = (workspace.metrics(f"{source}-{ranks}") for ranks in runs)
    for expected, found in zip(one, two, strict=True):
        for value in ("loss", "grad_norm"):
            assert found[value] == pytest.approx(expected[value], rel=1e-5)
    left, right = (CheckpointReader(workspace.path / f"{source}-{ranks}") for ranks in runs)
    for key in left.shapes:
        torch.testing.assert_close(left.read(key), right.read(key), rtol=0, atol=1e-5)
