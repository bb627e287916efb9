"""The flags `--prune-*` and `--images-*` of the pruning job on image networks."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ext.options.fields import option
from megatron_ext.pruning.activations import WidthMetric
from megatron_ext.pruning.aggregations import AGGREGATIONS
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Scan
from megatron_ext.vision.pruning.targets import ImageTargets


def depth_metrics() -> Iterable[str]:
    """Those that need no task."""
    return [name for name, metric in DEPTH_METRICS.items() if not (isinstance(metric, Scan) and metric.worse is None)]


@dataclass(frozen=True)
class CalibrationImages:
    """The images that scores are measured on, looked at as the checkpoint's validation did."""

    train: str | None = option(None, "Images: folders by class, or tar or parquet files.")


@dataclass(frozen=True)
class PruneImageOptions:
    """What the smaller network should be, and how importance is measured."""

    target_params: float | None = option(None, "Parameters to keep: up to 1.0 a fraction, above it a count.")
    conv_channels: float | None = option(None, "Share of the channels inside blocks of convolutions to keep.")
    attention_heads: float | None = option(None, "Share of each stage's attention heads to keep.")
    mixer_channels: float | None = option(None, "Share of the channels of mixers' branches to keep.")
    mlp_channels: float | None = option(None, "Share of the hidden channels of MLPs to keep.")
    divisor: int = option(8, "What numbers of channels are multiples of, where the whole ones are.")
    blocks: int | None = option(None, "Blocks to keep, of whatever kind and stage.")
    width_metric: Literal["activation", "magnitude"] = option(
        "activation", "Importance of widths: activations, or weights alone."
    )
    batch_aggregation: str = option("l2", "How activations are aggregated over the images.", choices=AGGREGATIONS.keys)
    sequence_aggregation: str = option(
        "mean", "How activations are aggregated over an image's pixels.", choices=AGGREGATIONS.keys
    )
    depth_metric: str = option(
        "loss", "Importance of blocks: how much they change, or what is lost without them.", choices=depth_metrics
    )
    samples: int = option(1024, "Calibration images.")
    scores: str | None = option(None, "Cut by this score file, made earlier, instead of calibrating.")
    plan: str | None = option(None, "Apply this plan, instead of making one.")

    def targets(self) -> ImageTargets:
        """What is asked for."""
        shares = {
            "conv": self.conv_channels, "heads": self.attention_heads, "inner": self.mixer_channels,
            "hidden": self.mlp_channels,
        }  # fmt: skip
        given = {width: share for width, share in shares.items() if share is not None}
        return ImageTargets(given, self.target_params, self.blocks, self.depth_metric, self.divisor)

    def rounds(self, model: Any) -> list[ImageTargets]:
        """All at once."""
        return [self.targets()]

    def given(self) -> dict[str, object]:
        """The options that are not at their defaults."""
        every = {each.name: (getattr(self, each.name), each.default) for each in dataclasses.fields(self)}
        return {name: value for name, (value, default) in every.items() if value != default}

    @property
    def calibrates(self) -> bool:
        """Whether the network must see images to be scored."""
        return self.width_metric != "magnitude" or self.blocks is not None

    @property
    def width(self) -> WidthMetric:
        """How activations become importance."""
        return WidthMetric("activation", self.batch_aggregation, self.sequence_aggregation)

    def metric(self) -> str:
        """How importance is measured, in words."""
        width = "l2 norms of weights" if self.width_metric == "magnitude" else str(self.width)
        return f"{width}; depth by {self.depth_metric}"
