"""What a segmenter is trained and measured on: cross-entropy of pixels; in validation the confusion of classes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.vision.downstream.colours import normalised
from megatron_ext.vision.segmentation.confusion import Confusion, scores
from megatron_ext.vision.segmentation.folders import IGNORED, SegmentationFolder
from megatron_ext.vision.segmentation.options import SegmentOptions
from megatron_ext.vision.segmentation.upernet import predict, resized
from megatron_ext.vision.segmentation.variations import Crops, Whole

if TYPE_CHECKING:
    from megatron_ext.training.job import RunConfig
    from megatron_ext.training.step import Task

SHARE = "share of pixels"
UNITS = {
    "loss": "nats per pixel", "auxiliary_loss": "nats per pixel", "pixel_accuracy": SHARE, "mean_accuracy": SHARE,
    "miou": "mean over classes", "skipped": "unreadable files per image",
}  # fmt: skip


def segmentation(run: "RunConfig") -> "Task":
    """The task of a validated command line."""
    from megatron.core import mpu

    from megatron_ext.data.schema import BatchSchema, Field
    from megatron_ext.training.step import Task, batch_step
    from megatron_ext.vision.downstream.samples import TrainingSamples, ValidationSamples, rounds

    model: Any = run.model
    backbone, options, args = model.backbone, run.options["segment"], run.args
    side, channels = backbone.resolution, backbone.image_channels
    confusion = Confusion(backbone.classes)
    number, flat = Field((), torch.int64), Field((None,), torch.uint8)
    crops = {"pixels": Field((channels, side, side), torch.uint8), "labels": Field((side, side), torch.uint8)}
    training = BatchSchema(crops | {"skipped": number})
    sizes = {"size": Field((4,), torch.int64), "image": number, "skipped": number}
    validation = BatchSchema({"pixels": flat, "labels": flat} | sizes)

    def losses(batch: Mapping[str, Tensor], logits: Any) -> Any:
        labels = batch["labels"].long()
        main, auxiliary = (resized(each.float(), (side, side)) for each in logits)
        known = labels != IGNORED
        total, extra = (
            F.cross_entropy(each, labels, ignore_index=IGNORED, reduction="sum") for each in (main, auxiliary)
        )
        count = known.sum()
        found = {"loss": (total, count), "auxiliary_loss": (extra, count)}
        found["pixel_accuracy"] = ((main.argmax(1) == labels) & known).sum(), count
        found["skipped"] = _skipped(batch)
        return total + options.auxiliary * extra, count, found

    def measured(network: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=batch["pixels"].device)
        count = torch.zeros((), dtype=torch.int64, device=total.device)
        for image, labels in whole_images(batch, channels):
            logits = predict(network, normalised(image), (labels.shape[0], labels.shape[1]))
            total += F.cross_entropy(logits[None], labels[None].long(), ignore_index=IGNORED, reduction="sum")
            count += (labels != IGNORED).sum()
            confusion.add(logits.argmax(0), labels)
        return total, count

    def validation_losses(batch: Mapping[str, Tensor], output: Any) -> Any:
        total, count = output
        return total, count, {"loss": (total, count), "skipped": _skipped(batch)}

    learn = batch_step(training, lambda network, batch: network(normalised(batch["pixels"])), losses)
    measure = batch_step(validation, measured, validation_losses)

    def step(data: Any, network: torch.nn.Module) -> Any:
        return (learn if network.training else measure)(data, network)

    def datasets(wanted: Any, vp_stage: int | None = None) -> Any:
        train = valid = None
        if wanted[0] != 0 and not args.skip_train:
            source = folder(options, options.train, backbone)
            train = TrainingSamples(source, Crops(options, backbone), args.seed, wanted[0])
        if wanted[1] != 0:
            source = folder(options, options.valid, backbone)
            whole = Whole(source, side if options.shorter is None else options.shorter, channels)
            valid = ValidationSamples(source, whole, args.seed, *rounds(args, wanted[1], len(source)))
        return train, valid, None

    def whole() -> dict[str, float]:
        return scores(confusion.take(mpu.get_data_parallel_group(), torch.cuda.current_device()))

    return Task(step, datasets, UNITS, whole=whole)


def folder(options: SegmentOptions, split: str, backbone: Any) -> SegmentationFolder:
    """A split of the images."""
    return SegmentationFolder(Path(options.data or ""), split, backbone.classes, backbone.image_channels)


def whole_images(batch: Mapping[str, Tensor], channels: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of a batch the images (1, c, h, w) and labels (h, w) that count."""
    parts = zip(batch["pixels"], batch["labels"], batch["size"].tolist(), batch["image"].tolist(), strict=True)
    for pixels, labels, (height, width, rows, columns), image in parts:
        if image >= 0:
            yield (
                pixels[: channels * height * width].view(1, channels, height, width),
                labels[: rows * columns].view(rows, columns),
            )


def _skipped(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["skipped"].sum(), torch.tensor(len(batch["skipped"]), device=batch["skipped"].device)
