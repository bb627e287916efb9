"""Depth importance of image networks: what a block changes, and what is lost without it."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.pruning import scores as names
from megatron_ext.pruning.ablation import Outcome
from megatron_ext.pruning.depth import change
from megatron_ext.pruning.depth_metrics import changes
from megatron_ext.pruning.left_out import LeftOut
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.pruning.axes import blocks_of


class Blocks(NamedTuple):
    """The blocks of a network as those see them who leave some out (`pruning.left_out.Sublayers`).

    Attributes:
        pattern: Their kinds.
    """

    pattern: str

    @property
    def layers(self) -> Any:
        """There is no coarser unit."""
        raise AssertionError("blocks of image networks are chosen one by one")


def modules_of(chunk: Any) -> list[torch.nn.Module]:
    """The blocks of a network, in the order of the forward pass."""
    return [chunk.backbone.stages[b.stage].blocks[b.place] for b in blocks_of(chunk.backbone.model)]


class BlockChanges:
    """Hooks that measure how much each block changes its pixels, by the metrics that come for free.

    Args:
        chunks: This rank's networks, unwrapped, of which there is one.
    """

    def __init__(self, chunks: Iterable[Any]) -> None:
        self._metrics, self._sums, self._handles = changes(), dict[int, Tensor](), list[Any]()
        for chunk in chunks:
            self._groups = chunk.pg_collection
            for number, block in enumerate(modules_of(chunk)):
                self._handles.append(block.register_forward_hook(partial(self._see, number)))

    def remove(self) -> None:
        """Take the hooks off the network."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _see(self, number: int, _: Any, args: Any, after: Tensor) -> None:
        before = args[0]
        if before.dim() == 4:
            before, after = (x.flatten(2).transpose(1, 2) for x in (before, after))
        sums = change(before, after, self._metrics.values())
        self._sums[number] = self._sums[number] + sums if number in self._sums else sums

    def gather(self) -> dict[str, Tensor] | None:
        """The scores, float32, on rank 0; None elsewhere. A collective of all ranks."""
        sums = torch.stack([self._sums[number] for number in sorted(self._sums)])
        dist.all_reduce(sums, group=self._groups.dp)
        if dist.get_rank():
            return None
        means = (sums / sums[:, -1:].clamp_min(1)).float().cpu()
        return {names.depth(metric): means[:, place] for place, metric in enumerate(self._metrics)}


class ImageAblation(LeftOut):
    """A network of which blocks can be left out; its logits are compared with those of the whole.

    Args:
        chunks: This rank's networks, unwrapped, of which there is one, in evaluation mode.
        model: The whole network.
        run: Runs the calibration images, the same each time, and gives the mean loss over all ranks.
    """

    def __init__(self, chunks: list[Any], model: MambaVision, run: Callable[[], float]) -> None:
        super().__init__(chunks, Blocks(model.pattern.replace("/", "")))
        self._run, self._seen = run, list[Tensor]()
        self._whole: list[Tensor] = []
        self._known: dict[frozenset[int], Outcome] = {}
        self._group = chunks[0].pg_collection.dp
        self._undo.append(chunks[0].register_forward_hook(lambda _, __, logits: self._seen.append(logits)).remove)

    def _sublayers(self, chunk: Any) -> Iterable[tuple[int, Any]]:
        return enumerate(modules_of(chunk))

    @property
    def whole(self) -> Outcome:
        """The outcome of the whole network."""
        return self.outcome(())

    def outcome(self, units: Iterable[int]) -> Outcome:
        """The outcome without these blocks, remembered from an earlier request. A collective of all ranks."""
        dropped = frozenset(units)
        if dropped and not self._whole:
            self.outcome(())
        if dropped not in self._known:
            self._seen.clear()
            with self.without(dropped):
                loss = self._run()
            if not dropped:
                self._whole = list(self._seen)
            self._known[dropped] = self._compared(loss)
        return self._known[dropped]

    def _compared(self, loss: float) -> Outcome:
        sums = torch.zeros(4, dtype=torch.float64, device=self._whole[0].device)
        for logits, whole in zip(self._seen, self._whole, strict=True):
            difference, size = ((x.double() ** 2).sum(-1) for x in (logits.float() - whole.float(), whole.float()))
            sums += torch.stack([difference.sum(), size.sum(), difference.sqrt().sum(), sums.new_tensor(len(size))])
        dist.all_reduce(sums, group=self._group)
        difference, size, norm, count = sums.tolist()
        return Outcome(loss, difference / size, norm / count)
