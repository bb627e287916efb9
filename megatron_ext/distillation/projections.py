"""Linear maps from the student's states to the teacher's, where the widths differ, and the weight of their losses.

They are trained beside the student by an optimizer of their own, and saved beside its checkpoints, so that those know
nothing of them. What is saved does not depend on the parallel layout.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ext.checkpoint.atomic import atomic_write
from megatron_ext.distillation.intermediate_layers import PipelineRouting
from megatron_ext.errors import CheckpointError

AGAIN = "all that distill_gpt.py saved, in the directory that is resumed; or --finetune and a new --save to begin anew"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Projections:
    """The maps of the pairs that meet on this rank's stages: weights in fp32, alike on all ranks of a stage.

    Args:
        route: The pairs, and where they meet.
        stages: This rank's pipeline stages.
        seed: Of the first weights.
        clip: The largest norm of a map's gradient; 0 for any.
        schedule: Makes Megatron's learning-rate scheduler for an optimizer; it begins at the run's learning rate.
    """

    def __init__(
        self,
        route: PipelineRouting,
        stages: list[int],
        seed: int,
        clip: float,
        schedule: Callable[[torch.optim.Optimizer], Any],
    ) -> None:
        student, teacher = route.widths
        self._weights: dict[int, torch.nn.Parameter] = {}
        for i in sorted(i for stage in stages for i in route.meeting(stage)) if student != teacher else ():
            generator = torch.Generator().manual_seed(seed + i)
            weight = torch.randn(teacher, student, generator=generator) / student**0.5
            self._weights[i] = torch.nn.Parameter(weight.to(torch.cuda.current_device()))
        self._names = {
            i: f"states {pair}.safetensors".replace(" ", "-").replace(":", "-") for i, pair in enumerate(route.pairs)
        }
        self._clip = clip
        # An optimizer wants parameters; a rank without any has a learning rate all the same.
        parameters = list(self._weights.values()) or [torch.nn.Parameter(torch.zeros(1))]
        self._optimizer = torch.optim.AdamW(parameters)
        self._schedule = schedule(self._optimizer)

    def __call__(self, pair: int, state: Float[Tensor, "s b h"]) -> Float[Tensor, "s b k"]:
        """The student's state as one of the teacher's width."""
        weight = self._weights.get(pair)
        return state if weight is None else F.linear(state, weight.to(state.dtype))

    def step(self, groups: Any, sequence_parallel: bool, divisor: Tensor | float, samples: int) -> None:
        """One step of the optimizer, after the last micro-batch.

        Args:
            groups: The student's process groups.
            sequence_parallel: Whether each tensor rank has had a part of the sequence.
            divisor: What the sum over data-parallel ranks is divided by.
            samples: Sequences of the step, by which the learning rate goes on.
        """
        for weight in self._weights.values():
            gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
            dist.all_reduce(gradient, group=groups.dp_cp)
            if sequence_parallel:
                dist.all_reduce(gradient, group=groups.tp)
            weight.grad = gradient.div_(divisor)
            if self._clip:
                torch.nn.utils.clip_grad_norm_([weight], self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step(increment=samples)

    def save(self, folder: Path) -> None:
        """Write this rank's maps; to be called on one rank of each stage."""
        for i, weight in self._weights.items():
            state = self._optimizer.state[weight]
            tensors = {"weight": weight.detach(), "step": state["step"], **{name: state[name] for name in _MOMENTS}}
            with atomic_write(folder / self._names[i]) as temporary:
                save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, temporary)

    def load(self, folder: Path, samples: int) -> None:
        """Go on from what was saved.

        Args:
            folder: Where.
            samples: Sequences that were trained on so far.

        Raises:
            CheckpointError: A map is missing, or of another shape.
        """
        self._schedule.step(increment=samples)
        for i, weight in self._weights.items():
            path = folder / self._names[i]
            if not path.is_file():
                raise CheckpointError("a projection of intermediate states is missing", got=path, legal=AGAIN)
            tensors = load_file(path)
            if tensors["weight"].shape != weight.shape:
                raise CheckpointError(
                    "a projection of intermediate states has another shape",
                    got=f"{path}: {list(tensors['weight'].shape)}",
                    legal=list(weight.shape),
                )
            with torch.no_grad():
                weight.copy_(tensors["weight"])
            state = {name: tensors[name].to(weight.device) for name in _MOMENTS}
            self._optimizer.state[weight] = {"step": tensors["step"], **state}


class LossBalancer:
    """The weight of the intermediate states that makes their loss as large as the logits': alpha = L_logits / L_is.

    Minitron (arXiv 2407.14679, section 3). It is the ratio over all tokens of the step before, so that it does not
    depend on how a step is cut into micro-batches and ranks; the first step has none, and weight 0.
    """

    def __init__(self) -> None:
        self.alpha = 0.0
        self._sums: Tensor | None = None

    def add(self, logits: Tensor, states: Tensor) -> None:
        """The sums over the tokens of a micro-batch of both losses."""
        sums = torch.stack([logits.detach().double(), states.detach().double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def step(self, groups: Any) -> None:
        """After the last micro-batch, on the ranks of the last stage."""
        if self._sums is None:
            return
        dist.all_reduce(self._sums, group=groups.dp_cp)
        logits, states = self._sums.tolist()
        self.alpha, self._sums = (logits / states if states > 0 else 0.0), None
