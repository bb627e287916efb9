"""The wing of `toy_wing.py` with three models beside its classifier, which the engine has never heard of.

A frozen `teacher`; an `assistant` that learns the labels, with a learning rate of its own; and a `map` that learns to
make the teacher's logits of the classifier's. The first two begin as the classifier in `given`, where the program runs.
"""

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import toy_wing
from torch import Tensor
from toy_wing import CLASSES, FAMILY, Classifier

from megatron_ext import program
from megatron_ext.training.job import RunConfig
from megatron_ext.training.run_job import run_job

ASSISTANT_LR = 3e-2
GIVEN = Path("given/iter_0000002")


def build(chunks: list[Any], args: Namespace) -> list[Any]:
    from megatron_ext.models.module_builder import build_beside

    return build_beside(FAMILY.config(args, Classifier(32)), chunks)


def build_map(chunks: list[Any], args: Namespace) -> list[Any]:
    linear = torch.nn.Linear(CLASSES, CLASSES, bias=False)
    torch.nn.init.eye_(linear.weight)
    return [linear]


def extra_models(run: RunConfig) -> list[Any]:
    from megatron_ext.models.module_builder import read_weights
    from megatron_ext.training.extra_models import ExtraModel
    from megatron_ext.training.extra_optimizers import ReplicatedOptimizer, ShardedOptimizer

    given = partial(read_weights, step=GIVEN)
    own = Namespace(**vars(run.args) | {"lr": ASSISTANT_LR})
    return [
        ExtraModel("teacher", build, given),
        ExtraModel("assistant", build, given, ShardedOptimizer, own),
        ExtraModel("map", build_map, optimizer=ReplicatedOptimizer),
    ]


def forward(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    from megatron_ext.training.extra_models import beside

    own, image = beside(model), batch["image"]
    assert all(weight.grad is None and not weight.requires_grad for weight in own["teacher"].parameters())
    assert (own["assistant"].training, own["teacher"].training) == (model.training, False)
    logits, teacher = model(image), own["teacher"](image.to(next(own["teacher"].parameters()).dtype))
    return logits.float(), teacher.float(), own["assistant"](image).float(), own["map"](logits.float())


def task(run: RunConfig) -> Any:
    from megatron_ext.data.schema import BatchSchema, Field
    from megatron_ext.training.step import batch_step

    def losses(batch: Mapping[str, Tensor], output: tuple[Tensor, ...]) -> Any:
        logits, teacher, assistant, mapped = output
        label, count = batch["label"], torch.tensor(len(batch["label"]), device=logits.device)
        parts = {
            name: F.cross_entropy(value, label, reduction="sum")
            for name, value in (("loss", logits), ("teacher_loss", teacher), ("assistant_loss", assistant))
        }
        parts["distance"] = (mapped - teacher).square().sum()
        total = parts["loss"] + parts["assistant_loss"] + parts["distance"]
        return total, count, {name: (value, count) for name, value in parts.items()}

    schema = BatchSchema({"image": Field((toy_wing.SIDE,) * 2, torch.float32), "label": Field((), torch.int64)})
    units = dict.fromkeys(("loss", "teacher_loss", "assistant_loss"), "nats per image") | {"distance": "logits squared"}
    step = batch_step(schema, forward, losses)
    return replace(toy_wing.task(run), forward_step=step, units=units, extra_models=extra_models(run))


JOB = replace(toy_wing.JOB, task=task)

if __name__ == "__main__":
    sys.exit(program.main(lambda: run_job(JOB, sys.argv[1:])))
