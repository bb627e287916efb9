"""A trained checkpoint as a plain network, whatever layout saved it, and how its images were looked at."""

from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.errors import CheckpointError
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.average import buffer_name
from megatron_ext.vision.family import FAMILY
from megatron_ext.vision.network import Network


def model_of(step: Path) -> MambaVision:
    """The network that a step holds.

    Raises:
        CheckpointError: It holds another kind of model, or cannot be read.
    """
    if (held := layout.family(step)) != FAMILY.name:
        raise CheckpointError("no image network", got=f"{step}: {held or 'a language model'}", legal=FAMILY.name)
    return FAMILY.on_disk(layout.find(step))


def read_network(path: Path, averaged: bool = False) -> Network:
    """The network of a step, or of the newest step in a directory, in evaluation mode.

    Args:
        path: The checkpoint.
        averaged: Whether its weights are to be their moving average.

    Raises:
        CheckpointError: There is none, it holds another kind of model, or it is damaged.
    """
    step = layout.find(path)
    network, reader = Network(model_of(step.path)).eval(), CheckpointReader(step.path)
    if averaged and "average.step" not in reader.shapes:
        raise CheckpointError("the checkpoint has no average of its weights", got=step.path, legal="averaged=False")
    state = {}
    for name, value in network.state_dict().items():
        of_average = averaged and value.is_floating_point()
        state[name] = reader.read(f"average.{buffer_name(name)}" if of_average else f"backbone.{name}")
    network.load_state_dict(state)
    return network


class Evaluation(NamedTuple):
    """How a network's images are looked at, and what it calls what it sees.

    Attributes:
        crop: Share of an image's shorter side.
        interpolation: How images are scaled.
        classes: Names in order of their numbers; None where the checkpoint does not say them.
        images: Where it learned from; None where the checkpoint does not say it.
    """

    crop: float = 1.0
    interpolation: str = "bicubic"
    classes: tuple[str, ...] | None = None
    images: str | None = None


def read_evaluation(path: Path) -> Evaluation:
    """Of a step, or of the newest step in a directory.

    Raises:
        CheckpointError: There is none, it holds another kind of model, or it is damaged.
    """
    step = layout.find(path).path
    model_of(step)
    args: Any = layout.common(step)["args"]
    names, plain = getattr(args, "ext_classes", None), Evaluation()
    return Evaluation(
        crop=getattr(args, "images_crop", None) or plain.crop,
        interpolation=getattr(args, "images_interpolation", None) or plain.interpolation,
        classes=None if names is None else tuple(names),
        images=getattr(args, "images_train", None),
    )
