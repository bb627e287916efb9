"""Width importance of image networks: how large what goes into the layer is that reads an axis last.

Between two convolutions that is the input of the second; of an MLP its hidden channels; of attention the L2 norm of a
head's output before the projection; of a mixer a channel's two branches before the last projection (their product where
one gates the other). Each is aggregated over an image's pixels, the padding of windows among them, and over images.

Shapes: s pixels of a stage, b micro-batch, n positions of an axis on this rank.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_ext.pruning.activations import Activations, WidthMetric
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.pruning import scores as names
from megatron_ext.vision.pruning.axes import LAST, Axis, blocks_of


class ImageActivations(Activations):
    """Hooks on the network of one rank that accumulate scores while images run through it.

    Args:
        chunks: This rank's networks, unwrapped, of which there is one.
        model: The whole network.
        metric: How activations are aggregated.
    """

    def __init__(self, chunks: Iterable[Any], model: MambaVision, metric: WidthMetric) -> None:
        super().__init__(metric)
        self._model, self._images = model, 0
        for chunk in chunks:
            self._groups = chunk.pg_collection
            self._handles.append(chunk.backbone.register_forward_pre_hook(self._count))
            for number, block in enumerate(blocks_of(model)):
                own = chunk.backbone.stages[block.stage].blocks[block.place]
                for width, (last, axis) in LAST[block.kind].items():
                    see = partial(self._see, names.width(number, width), axis)
                    self._handles.append(own.get_submodule(last).register_forward_pre_hook(see))

    def _count(self, _: Any, args: Any) -> None:
        self._images = len(args[0])
        self._samples += self._images

    def _see(self, name: str, axis: Axis, _: Any, args: Any) -> None:
        x = tokens(args[0], self._images).float()
        entries = axis.entries(self._model)
        self._add(name, x if entries == 1 else x.unflatten(-1, (-1, entries)).norm(dim=-1))

    def _assemble(self, merged: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Every tensor-parallel rank has all channels of convolutions."""
        return {name: shards[0] if name.endswith(".conv") else torch.cat(shards) for name, shards in merged.items()}


def tokens(x: Float[Tensor, "_ ..."], images: int) -> Float[Tensor, "s b n"]:
    """The pixels of each image, (b, n, h, w), or the tokens of its windows, (b windows, l, n)."""
    if x.dim() == 4:
        return x.flatten(2).permute(2, 0, 1)
    return x.unflatten(0, (images, -1)).flatten(1, 2).transpose(0, 1)
