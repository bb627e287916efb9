"""The network that gives features at strides 4, 8, 16 and 32, and where its weights begin."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ext.errors import ConfigError
from megatron_ext.training.job import RunConfig
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.beginning import check_weights, read_weights
from megatron_ext.vision.blocks import BatchNorm
from megatron_ext.vision.linears import Linears
from megatron_ext.vision.network import PLAIN, Network


class Backbone(Network):
    """A network without its classifier, whose four features are normalised over the batch, each by itself."""

    def __init__(self, model: MambaVision, linears: Linears = PLAIN) -> None:
        super().__init__(model, linears)
        self.norm, self.head = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        self.norms = nn.ModuleList(BatchNorm(model.channels(index)) for index in range(4))

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """The features of images (b, c, h, w), from the largest to the smallest."""
        return [norm(feature) for norm, feature in zip(self.norms, self.forward_features(x), strict=True)]


def read_backbone(path: Path, model: MambaVision) -> dict[str, Tensor]:
    """The weights of a trained classifier's features.

    Args:
        path: A checkpoint of `megatron-ext vision`, or a file of published weights.
        model: The network that they are for; classes, resolution, windows and drop path may be others.

    Raises:
        CheckpointError: It cannot be read, or holds another network.
    """
    found = read_weights(path, replace(model, classes=check_weights(path, model, averaged=False)), averaged=False)
    return {name: value for name, value in found.items() if not name.startswith(("head.", "norm."))}


def begin_with(path: Path, model: MambaVision) -> Callable[[list[Any]], list[Any]]:
    """A hook of the training loop: the backbone's weights, of which each tensor-parallel rank takes its part."""

    def load(chunks: list[Any]) -> list[Any]:
        weights, backbone = read_backbone(path, model), chunks[0].network.backbone
        own = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
        with torch.no_grad():
            for name, value in weights.items():
                place, linears = own[name], backbone.linears
                if getattr(place, "tensor_model_parallel", False):
                    value = value.chunk(linears.size, place.partition_dim)[linears.rank]  # type: ignore[attr-defined]
                place.copy_(value)
        return chunks

    return load


def check_backbone(run: RunConfig, file: str | None, flag: str) -> None:
    """Check the weights that a new run's backbone is to begin with.

    Raises:
        ConfigError: `flag` names them, and a checkpoint has them, too.
        CheckpointError: They are not those of the backbone.
    """
    if file is None or run.resumed:
        return
    if run.start is not None:
        got = f"{run.start.flag} and {flag}"
        raise ConfigError("the backbone's weights are in the checkpoint, too", got=got, legal="one of them")
    model: Any = run.model
    read_backbone(Path(file), model.backbone)


def train_or_measure(run: RunConfig, file: str | None) -> None:
    """Train, a new run from these weights of the backbone, or measure with `--skip-train`."""
    if run.args.skip_train:
        from megatron_ext.training import validation

        validation.validate(run)
        return
    from megatron_ext.training import loop

    model: Any = run.model
    begins = file is not None and run.start is None
    loop.train(run, hooks=(begin_with(Path(file or ""), model.backbone),) if begins else ())
