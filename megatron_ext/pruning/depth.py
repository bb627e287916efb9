"""Depth importance from one forward pass: how much a sub-layer, or a block, changes the residual stream.

The measures of the change are those of `depth_metrics`, averaged over tokens. What it costs to leave a unit out is
measured by `megatron_ext.pruning.ablation`.

Shapes: s sequence (this rank's part), b micro-batch, h hidden, m metrics.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import Pattern
from megatron_ext.pruning import scores as names
from megatron_ext.pruning.depth_metrics import Change, Move, changes


def check_borders(pattern: Pattern) -> None:
    """Refuse a pipeline split inside a block, whose influence no stage could measure.

    Raises:
        ConfigError: Names the border.
    """
    starts = {block[0] for block in pattern.blocks}
    for border in pattern.borders:
        if border not in starts:
            raise ConfigError(
                f"the pipeline border before sub-layer {border} cuts a block in two", got=str(pattern),
                legal=f"borders before a mixer, such as {pattern.split(len(pattern.borders) + 1)}",
            )  # fmt: skip


def change(
    before: Float[Tensor, "s b h"], after: Float[Tensor, "s b h"], metrics: Iterable[Change]
) -> Float[Tensor, " m+1"]:
    """The sums over tokens of some measures, in their order, and the number of tokens, in float64.

    A token whose stream is zero (an embedding row that was never trained) has no direction and no size to compare with:
    it is not counted.
    """
    before, after = before.float(), after.float()
    move = Move(before, after, after - before, before.norm(dim=-1))
    there = move.length > 0
    each = [torch.where(there, metric.of(move), 0.0).double().sum() for metric in metrics]
    return torch.stack([*each, there.double().sum()])


class BlockInfluence:
    """Hooks on the chunks of one rank that measure each sub-layer and block while data runs through the model.

    Args:
        chunks: This rank's `HybridModel`s, unwrapped. No pipeline border may cut a block (`check_borders`).
        architecture: The whole model.
    """

    def __init__(self, chunks: Iterable[Any], architecture: Architecture) -> None:
        self.architecture = architecture
        self._metrics = changes()
        self._sums: dict[str, Tensor] = {}
        self._unit_input: Tensor | None = None
        self._block_input: Tensor | None = None
        self._handles: list[Any] = []
        self._starts = {block[0] for block in architecture.layers.blocks}
        self._ends = {block[-1]: number for number, block in enumerate(architecture.layers.blocks)}
        for chunk in chunks:
            self._groups = chunk.pg_collection
            for layer in chunk.decoder.layers:
                index = layer.layer_number - 1
                self._handles.append(layer.register_forward_pre_hook(self._enter(index), with_kwargs=True))
                self._handles.append(layer.register_forward_hook(self._leave(index), with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, index: int) -> Callable[..., None]:
        def see(_: Any, args: Any, kwargs: Any) -> None:
            self._unit_input = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if index in self._starts:
                self._block_input = self._unit_input

        return see

    def _leave(self, index: int) -> Callable[..., None]:
        def see(_: Any, __: Any, ___: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            assert self._unit_input is not None
            self._add(f"unit.{index}", self._unit_input, after)
            if index in self._ends:
                block = self.architecture.layers.blocks[self._ends[index]]
                assert self._block_input is not None
                if len(block) == 1:
                    self._sums[f"block.{self._ends[index]}"] = self._sums[f"unit.{index}"]
                else:
                    self._add(f"block.{self._ends[index]}", self._block_input, after)

        return see

    @torch.no_grad()
    def _add(self, name: str, before: Tensor, after: Tensor) -> None:
        sums = change(before, after, self._metrics.values())
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def gather(self) -> dict[str, Tensor] | None:
        """The scores of the whole model, float32, on rank 0; None elsewhere. A collective of all ranks."""
        groups = self._groups
        sums = dict(self._sums)
        for name, value in sums.items():
            total = value.clone()
            for group in (groups.dp, groups.cp, groups.tp):  # without sequence parallelism TP only repeats the count
                dist.all_reduce(total, group=group)
            sums[name] = total.cpu()
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, sums)
        if dist.get_rank():
            return None
        whole: dict[str, Tensor] = {name: value for part in parts for name, value in part.items()}
        result = {}
        for prefix, count, blocks in (
            ("unit", len(self.architecture.pattern), False),
            ("block", len(self.architecture.layers.blocks), True),
        ):
            sums = torch.stack([whole[f"{prefix}.{i}"] for i in range(count)])
            means = sums / sums[:, -1:].clamp_min(1)  # of no token at all: nothing has changed
            for place, metric in enumerate(self._metrics):
                result[names.depth(metric, blocks=blocks)] = means[:, place].float()
        return result
