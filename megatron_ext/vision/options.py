"""The flags of training: images, and how they are varied and learned from. Defaults of `--images-*` are published."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.options.fields import option

Interpolation = Literal["bicubic", "bilinear", "lanczos", "nearest"]


@dataclass(frozen=True)
class ImageOptions:
    """Images to train and to measure on."""

    train: str | None = option(None, "Training images: folders by class, or tar or parquet files.")
    valid: str | None = option(None, "Validation images, with the same classes.")
    crop: float | None = option(
        None, "Share of an image's shorter side that validation looks at; by default the checkpoint's, or 1."
    )
    interpolation: Interpolation | None = option(
        None, "How validation scales images; by default as the checkpoint's was, or bicubic."
    )
    augment: str = option("rand-m9-mstd0.5-inc1", "timm's name of a policy that varies training images, or none.")
    smallest: float = option(0.08, "Smallest share of a training image that a crop keeps, by area.")
    flip: float = option(0.5, "Share of training images that are mirrored.")
    erasing: float = option(0.25, "Share of training images in which a rectangle is erased.")
    mixup: float = option(0.8, "Alpha of mixup; 0 for none.")
    cutmix: float = option(1.0, "Alpha of cutmix; 0 for none. Where there are both, each takes half of the batches.")
    smoothing: float = option(0.1, "Share of a label that all classes have in equal parts.")

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class AverageOptions:
    """The moving average of the weights."""

    decay: float = option(0.0, "How much of it a step leaves, such as .9998; 0 for no average.")


@dataclass(frozen=True)
class MesaOptions:
    """Agreement with the moving average's prediction (MESA)."""

    weight: float = option(0.0, "Weight of it, such as .5; 0 for none. Needs --average-decay.")
    start: float = option(0.25, "Share of the training's steps before it begins.")


@dataclass(frozen=True)
class PretrainedOptions:
    """What a new run begins from, beside Megatron's --pretrained-checkpoint DIR."""

    weights: str | None = option(None, "A file of published weights to begin from, such as a .pth.tar.")
    averaged: bool = option(False, "Begin from the moving average of the checkpoint's weights.")


@dataclass(frozen=True)
class FreezeOptions:
    """What is not trained."""

    stages: int = option(
        0, "Stages that stay as they are, with their statistics: the stem and the first 1 to 4 stages."
    )


@dataclass(frozen=True)
class LayerOptions:
    """Learning rates by depth."""

    decay: float = option(1.0, "Learning rate of each layer over that of the layer after it, such as .75.")


OPTIONS: dict[str, type] = {
    "images": ImageOptions, "average": AverageOptions, "mesa": MesaOptions, "pretrained": PretrainedOptions,
    "layer": LayerOptions, "freeze": FreezeOptions,
}  # fmt: skip
"""The flags of training, by their prefixes."""
