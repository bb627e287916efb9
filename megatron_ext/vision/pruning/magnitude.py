"""Weight magnitude, the baseline that needs no data: the L2 norm of the weights that lie on a position."""

import torch
from torch import Tensor

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.pruning import scores as names
from megatron_ext.vision.pruning.axes import TABLE, blocks_of


def magnitudes(reader: CheckpointReader, model: MambaVision) -> dict[str, Tensor]:
    """Width scores from a checkpoint's matrices and convolutions, float32; what has one dimension does not count."""
    squares: dict[str, Tensor] = {}
    for number, block in enumerate(blocks_of(model)):
        for name, axes in TABLE[block.kind].items():
            key = f"backbone.{block.key(name)}"
            if len(reader.shapes[key]) == 1:
                continue
            weight = reader.read(key).double().square()
            for dimension, axis in enumerate(axes):
                if axis is None:
                    continue
                each = weight.movedim(dimension, 0).flatten(1).sum(1).unflatten(0, (-1, axis.entries(model))).sum(1)
                place = names.width(number, axis.width)
                squares[place] = squares[place] + each if place in squares else each
    return {name: torch.sqrt(value).float() for name, value in squares.items()}
