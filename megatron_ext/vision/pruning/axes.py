"""The axes table of MambaVision: which dimension of which weight of a block lies on which axis that can be cut.

An axis is one of `architecture.WIDTHS`, whose positions are entries of a weight one after the other: so many for each.
Whatever is not in the table is kept whole: the channels of stages, the stem, the way down between stages, norms, the
classifier. Scoring, cutting and masking read this one table.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.vision.architecture import MambaVision


class Block(NamedTuple):
    """A block of a network.

    Attributes:
        stage: Counted from 0.
        place: Within the stage.
        kind: C convolution, M mixer, S self-attention.
    """

    stage: int
    place: int
    kind: str

    def key(self, name: str) -> str:
        """The name of one of its weights in the network."""
        return f"stages.{self.stage}.blocks.{self.place}.{name}"


class Axis(NamedTuple):
    """An axis of a weight.

    Attributes:
        width: One of `architecture.WIDTHS`.
        entries: How many entries of the dimension each position has.
    """

    width: str
    entries: Callable[[MambaVision], int] = lambda model: 1

    def taken(self, model: MambaVision, kept: Sequence[int]) -> Tensor:
        """The entries of the kept positions."""
        each = torch.arange(self.entries(model))
        return (torch.tensor(kept, dtype=torch.long)[:, None] * len(each) + each).flatten()


CONV, HIDDEN, INNER = Axis("conv"), Axis("hidden"), Axis("inner")
HEADS = Axis("heads", lambda model: model.head_dim)
QKV = Axis("heads", lambda model: 3 * model.head_dim)
BRANCHES = Axis("inner", lambda model: 2)
CONVOLVED = Axis("inner", lambda model: 2 if model.mixer in ("concatenated", "gated") else 1)
MIXED = Axis("inner", lambda model: 2 if model.mixer == "concatenated" else 1)
STATES = Axis("inner", lambda model: model.state)

_MLP = {"fc1.weight": (HIDDEN,), "fc1.bias": (HIDDEN,), "fc2.weight": (None, HIDDEN)}
TABLE: dict[str, dict[str, tuple[Axis | None, ...]]] = {
    "C": {
        "conv1.weight": (CONV,), "conv1.bias": (CONV,), "norm1.weight": (CONV,), "norm1.bias": (CONV,),
        "norm1.running_mean": (CONV,), "norm1.running_var": (CONV,), "conv2.weight": (None, CONV),
    },
    "M": {
        "mixer.in_proj.weight": (BRANCHES,), "mixer.conv_weight": (CONVOLVED,), "mixer.x_proj.weight": (None, INNER),
        "mixer.dt_proj.weight": (INNER,), "mixer.dt_proj.bias": (INNER,), "mixer.A_log": (STATES,),
        "mixer.D": (INNER,), "mixer.out_proj.weight": (None, MIXED), **_MLP,
    },
    "S": {
        "mixer.qkv.weight": (QKV,), "mixer.qkv.bias": (QKV,), "mixer.proj.weight": (None, HEADS), **_MLP,
    },
}  # fmt: skip
"""By kind of block and name: the axis of each dimension, None where it is whole; those after the last are whole."""

LAST: dict[str, dict[str, tuple[str, Axis]]] = {
    "C": {"conv": ("conv2", CONV)},
    "M": {"inner": ("mixer.out_proj", MIXED), "hidden": ("fc2", HIDDEN)},
    "S": {"heads": ("mixer.proj", HEADS), "hidden": ("fc2", HIDDEN)},
}
"""By kind of block and width: the layer that reads its positions last."""


def blocks_of(model: MambaVision) -> list[Block]:
    """All blocks of a network, in the order of the forward pass."""
    return [Block(s, p, kind) for s, stage in enumerate(model.stages) for p, kind in enumerate(stage)]


def size(model: MambaVision, stage: int, width: str) -> int:
    """Positions of one of `architecture.WIDTHS` in the blocks of a stage."""
    return getattr(model, width)(stage)
