"""What goes through a model, summed position by position in one forward pass, the same on every parallel layout.

An activation is aggregated over the sequence, then over the calibration samples, each by an entry of
`aggregations.AGGREGATIONS`. What is looked at in which model says the family's own class (`importance.Importance` of
language models).

Shapes: s sequence (this rank's part), b micro-batch.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from megatron_ext.pruning.aggregations import AGGREGATIONS


@dataclass(frozen=True)
class WidthMetric:
    """How activations become one number for each position.

    Attributes:
        kind: `activation`, or `wanda`, which always takes L2 norms.
        batch: Over the samples, of what `sequence` made of each: one of `AGGREGATIONS`.
        sequence: Over a sample's tokens: one of `AGGREGATIONS`.
    """

    kind: Literal["activation", "wanda"] = "activation"
    batch: str = "l2"
    sequence: str = "mean"

    def __str__(self) -> str:
        if self.kind == "wanda":
            return "weight times activation, l2 over all tokens"
        return f"{self.batch} over the batch, {self.sequence} over the sequence"


class Activations:
    """Sums on one rank, which hooks fill while calibration data runs through the model.

    Args:
        metric: How activations are aggregated.
    """

    _groups: Any  # the process groups, once they are known

    def __init__(self, metric: WidthMetric) -> None:
        self.metric = WidthMetric("wanda", "l2", "l2") if metric.kind == "wanda" else metric
        self._batch, self._sequence = AGGREGATIONS[self.metric.batch], AGGREGATIONS[self.metric.sequence]
        self._added: dict[str, Tensor] = {}  # over the samples, of what is made of each
        self._samples = torch.zeros((), dtype=torch.float64)
        self._handles: list[Any] = []

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _add(self, name: str, activation: Float[Tensor, "s b *axes"], split: bool = False) -> None:
        """Add one micro-batch: aggregated over the whole sequence, then added up over the samples."""
        sums = self._sequence.sums(activation)
        length = activation.shape[0]
        for group in ([self._groups.tp] if split else []) + [self._groups.cp]:
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
                length *= group.size()
        added = self._batch.sums(self._sequence.value(sums, length))
        self._added[name] = self._added[name] + added if name in self._added else added

    def gather(self) -> dict[str, Tensor] | None:
        """The scores of the whole model, float32, on rank 0; None elsewhere. A collective of all ranks.

        Sums over samples go over the data-parallel ranks; heads and neurons are put together over the tensor-parallel
        ranks (those of experts over the expert-parallel ones), layers over the pipeline.
        """
        groups = self._groups
        samples = self._samples.to(torch.cuda.current_device())
        for value in (*self._added.values(), samples):
            dist.all_reduce(value, group=groups.dp)
        here = None
        if groups.dp.rank() == 0 and groups.cp.rank() == 0:
            here = (groups.tp.rank(), {name: self._score(name, float(samples)).cpu() for name in self._added})
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, here)
        apart = self._apart()
        if dist.get_rank():
            return None
        merged: dict[str, list[Tensor]] = {}
        for _, values in sorted((part for part in parts if part is not None), key=lambda part: part[0]):
            for name, value in values.items():
                merged.setdefault(name, []).append(value)
        return {name: value.float() for name, value in (self._assemble(merged) | apart).items()}

    def _apart(self) -> dict[str, Tensor]:
        """What is gathered in another way."""
        return {}

    def _assemble(self, merged: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Scores of what the tensor-parallel ranks hold, one after the other."""
        return {name: torch.cat(shards) for name, shards in merged.items()}

    def _score(self, name: str, samples: float) -> Tensor:
        return self._batch.value(self._added[name], samples)
