"""The flags `--segment-*`. Defaults are those of the recipe that backbones are published with on ADE20K."""

from dataclasses import dataclass

from megatron_ext.options.fields import option


@dataclass(frozen=True)
class SegmentOptions:
    """Images and their annotations, pixel by pixel."""

    data: str | None = option(None, "Folder with images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png.")
    train: str = option("training", "SPLIT to train on.")
    valid: str = option("validation", "SPLIT to measure on.")
    backbone: str | None = option(None, "Weights to begin with: a vision checkpoint, or a file of published weights.")
    smallest: float = option(0.5, "Smallest factor by which training images are scaled.")
    largest: float = option(2.0, "Largest factor.")
    one_class: float = option(0.75, "Largest share of a training crop that one class may have, in ten tries.")
    flip: float = option(0.5, "Share of training images that are mirrored.")
    colour: bool = option(True, "Whether brightness, contrast, saturation and hue of training images vary.")
    auxiliary: float = option(0.4, "Weight of the auxiliary head's loss.")
    shorter: int | None = option(
        None, "Shorter side to which validation images are scaled; --mambavision-resolution by default, 0: as they are."
    )
    pictures: int = option(4, "Validation images whose prediction --skip-train draws into --save.")
