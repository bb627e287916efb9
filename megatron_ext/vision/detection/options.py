"""The flags `--detect-*`. Training images are scaled and cropped as in arXiv 2012.07177, section 3."""

from dataclasses import dataclass

from megatron_ext.options.fields import option


@dataclass(frozen=True)
class DetectOptions:
    """Images and their annotations in COCO's format."""

    train: str | None = option(None, "Folder of training images.")
    train_file: str | None = option(None, "Their annotations, a JSON file.")
    valid: str | None = option(None, "Folder of validation images.")
    valid_file: str | None = option(None, "Their annotations.")
    backbone: str | None = option(None, "Weights to begin with: a vision checkpoint, or a file of published weights.")
    smallest: float = option(0.1, "Smallest factor by which a training image is scaled, of what fits the square.")
    largest: float = option(2.0, "Largest factor.")
    flip: float = option(0.5, "Share of training images that are mirrored.")
    pictures: int = option(4, "Validation images on which --skip-train draws detections into --save.")
