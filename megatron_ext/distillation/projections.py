"""Linear maps from the student's states to the teacher's, where the widths differ, and the weight of their losses."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from megatron_ext.distillation.intermediate_layers import PipelineRouting


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


class Projections(torch.nn.Module):
    """The maps of the pairs that meet on one pipeline stage, whole on each of its ranks, and the balance of the losses.

    They are trained beside the student (`training.extra_optimizers.ReplicatedOptimizer`), which says how they are
    saved; their names are those of the pairs.

    Args:
        route: The pairs, and where they meet.
        stage: The pipeline stage.
        seed: Of the first weights.
    """

    def __init__(self, route: PipelineRouting, stage: int, seed: int) -> None:
        super().__init__()
        self.balance = LossBalancer()
        self._names: dict[int, str] = {}
        student, teacher = route.widths
        for i in route.meeting(stage) if student != teacher else ():
            generator = torch.Generator().manual_seed(seed + i)
            weight = torch.randn(teacher, student, generator=generator) / student**0.5
            self._names[i] = f"states {route.pairs[i]}".replace(" ", "-").replace(":", "-")
            self.register_parameter(self._names[i], torch.nn.Parameter(weight))

    def forward(self, pair: int, state: Float[Tensor, "s b h"]) -> Float[Tensor, "s b k"]:
        """The student's state as one of the teacher's width."""
        if pair not in self._names:
            return state
        return F.linear(state, self.get_parameter(self._names[pair]).to(state.dtype))

    def get_extra_state(self) -> dict[str, float]:
        """What is remembered beside the maps."""
        return {"alpha": self.balance.alpha}

    def set_extra_state(self, state: dict[str, float]) -> None:
        """Go on from it."""
        self.balance.alpha = float(state["alpha"])
