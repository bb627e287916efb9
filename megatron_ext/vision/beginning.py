"""What a new run begins from: a trained checkpoint's weights, their moving average, or a file of published weights.

The classifier is new where the classes are others; all other weights are the ones that were found.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.errors import CheckpointError
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.average import buffer_name
from megatron_ext.vision.network import Network
from megatron_ext.vision.weights import check_shapes, from_published, read_published

CLASSIFIER = ("head.weight", "head.bias")


def check_weights(path: Path, model: MambaVision, averaged: bool) -> int:
    """Find whether a network can begin with the weights of a step, or of a file of published ones.

    Returns:
        The number of classes that their classifier knows.

    Raises:
        CheckpointError: They cannot be read, or are another network's.
    """
    if path.is_file():
        return len(_published(path, model)["head.bias"])
    reader = CheckpointReader(path)
    if averaged and "average.step" not in reader.shapes:
        raise CheckpointError(
            "the checkpoint has no average of its weights", got=path, legal="no --pretrained-averaged"
        )
    found = {name.removeprefix("backbone."): s for name, s in reader.shapes.items() if name.startswith("backbone.")}
    classes = found.get("head.bias", (model.classes,))[0]
    check_shapes(found, replace(model, classes=classes))
    return classes


def read_weights(path: Path, model: MambaVision, averaged: bool) -> dict[str, Tensor]:
    """The weights of a step, or of a file of published ones, as a plain network has them; the classifier's, too."""
    if path.is_file():
        return _published(path, model)
    reader = CheckpointReader(path)
    with torch.device("meta"):
        state = Network(model).state_dict()
    return {
        name: reader.read(
            f"average.{buffer_name(name)}" if averaged and value.is_floating_point() else f"backbone.{name}"
        )
        for name, value in state.items()
    }


def _published(path: Path, model: MambaVision) -> dict[str, Tensor]:
    state = read_published(path)
    return from_published(state, replace(model, classes=len(state.get("head.bias", range(model.classes)))))


@torch.no_grad()
def fill(chunks: Sequence[Any], weights: dict[str, Tensor], new_classifier: bool, group: Any) -> None:
    """Begin with weights: each rank takes its part of them, and the average of the weights begins there.

    Args:
        chunks: Of the model that Megatron has built.
        weights: Of the whole network.
        new_classifier: Whether the classifier's stay as they were drawn.
        group: Tensor-parallel ranks.
    """
    (chunk,) = chunks
    network = chunk.backbone
    for name, own in (*network.named_parameters(), *network.named_buffers()):
        if new_classifier and name in CLASSIFIER:
            continue
        value = weights[name]
        if getattr(own, "tensor_model_parallel", False):
            value = value.chunk(group.size(), own.partition_dim)[group.rank()]
        own.copy_(value)
    if chunk.average is not None:
        chunk.average.update(0)
