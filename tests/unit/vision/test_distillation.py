"""What a student of another network's logits minimises, and which teachers it can have."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vision_oracle import SMALL

from megatron_ext.distillation.options import LogitOptions
from megatron_ext.errors import ConfigError
from megatron_ext.lm_head.objective import Objective
from megatron_ext.vision.distillation import ImageTeacher, LogitLesson


def test_the_loss_is_hintons() -> None:
    """T^2 KL(teacher || student) at temperature T, and the cross entropy with the labels, by sums in float64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    student.requires_grad_()
    labels, options = torch.tensor(1.5, dtype=torch.float64), LogitOptions(kd_weight="0.5:1", ce_weight="2")
    objective = options.weighted(options.compared(Objective(temperature=4.0)), 0.5)
    total, found = LogitLesson(lambda: objective).losses(student, teacher, labels)
    q, p = (torch.exp(x / 4) / torch.exp(x / 4).sum(1, keepdim=True) for x in (teacher, student))
    kd = 16 * (q * torch.log(q / p)).sum()
    torch.testing.assert_close(found["kd_loss"], kd)
    torch.testing.assert_close(total, 0.75 * kd + 2 * labels)
    total.backward()
    torch.testing.assert_close(student.grad, 0.75 * 4 * (p - q).detach())


def test_a_network_has_nothing_to_learn_from_itself() -> None:
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    for divergence in ("forward-kl", "reverse-kl", "jsd", "mse"):
        _, found = LogitLesson(lambda d=divergence: Objective(d)).losses(logits, logits, torch.tensor(0.0))
        assert abs(found["kd_loss"].item()) < 1e-6


@pytest.mark.parametrize(
    ("change", "tp", "what"),
    [
        ({"classes": 6}, 1, "--mambavision-classes 5"), ({"image_channels": 1}, 1, "--mambavision-image-channels 3"),
        ({}, 8, "the teacher cannot run beside the student: the attention heads"),
    ],
)  # fmt: skip
def test_teachers_of_others_are_refused(change: dict, tp: int, what: str) -> None:
    ImageTeacher(Path("here"), SMALL).check(SMALL, 2)
    with pytest.raises(ConfigError, match=what):
        ImageTeacher(Path("here"), SMALL).check(replace(SMALL, **change), tp)
