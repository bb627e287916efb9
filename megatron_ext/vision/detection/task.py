"""What a detector is trained and measured on: R-CNN's losses; in validation COCO's average precision."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_ext.vision.detection.coco import CocoImages
from megatron_ext.vision.detection.options import DetectOptions
from megatron_ext.vision.detection.precision import PLACES, Detections
from megatron_ext.vision.detection.rcnn import detect
from megatron_ext.vision.detection.variations import Squares, Whole, targets, whole_images
from megatron_ext.vision.downstream.colours import normalised

if TYPE_CHECKING:
    from megatron_ext.training.job import RunConfig
    from megatron_ext.training.step import Task

LOSSES = {"proposal_loss": ("loss_objectness", "loss_rpn_box_reg"), "class_loss": ("loss_classifier",)}
LOSSES |= {"box_loss": ("loss_box_reg",), "mask_loss": ("loss_mask",)}


def detection(run: "RunConfig") -> "Task":
    """The task of a validated command line."""
    from megatron.core import mpu

    from megatron_ext.data.schema import BatchSchema, Field
    from megatron_ext.training.step import Task, batch_step
    from megatron_ext.vision.downstream.samples import TrainingSamples, ValidationSamples, rounds

    model: Any = run.model
    backbone, options, args = model.backbone, run.options["detect"], run.args
    side, channels = backbone.resolution, backbone.image_channels
    kinds = ("box", "mask") if model.heads.masks else ("box",)
    measured: dict[str, Detections] = {}
    number = Field((), torch.int64)
    squares = {"pixels": Field((channels, side, side), torch.uint8), "skipped": number}
    squares |= {"boxes": Field((None, 4), torch.float32), "labels": Field((None,), torch.int64)}
    if model.heads.masks:
        squares["masks"] = Field((None, side, side // 8), torch.uint8)
    wholes = {"pixels": Field((None,), torch.uint8), "size": Field((4,), torch.int64), "image": number}

    def forward(network: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return network(normalised(batch["pixels"]), targets=targets(batch))

    def losses(batch: Mapping[str, Tensor], found: dict[str, Tensor]) -> Any:
        images = len(batch["skipped"])
        count = torch.tensor(images, device=batch["skipped"].device)
        total = torch.stack([each.float() for each in found.values()]).sum() * images
        sums = {"loss": (total, count), "skipped": (batch["skipped"].sum(), count)}
        for name, starts in LOSSES.items():
            own = [each.float() for loss, each in found.items() if loss.startswith(starts)]
            if own:
                sums[name] = torch.stack(own).sum() * images, count
        return total, count, sums

    def look(network: Any, batch: Mapping[str, Tensor]) -> Tensor:
        for image, pixels, size in whole_images(batch, channels):
            measured["valid"].add(image, detect(network, normalised(pixels), size))
        return torch.zeros((), device=batch["pixels"].device)

    def nothing(batch: Mapping[str, Tensor], output: Tensor) -> Any:
        count = torch.tensor(len(batch["skipped"]), device=output.device)
        return output, count, {"skipped": (batch["skipped"].sum(), count)}

    learn = batch_step(BatchSchema(squares), forward, losses)
    measure = batch_step(BatchSchema(wholes | {"skipped": number}), look, nothing)

    def step(data: Any, network: torch.nn.Module) -> Any:
        return (learn if network.training else measure)(data, network)

    def datasets(wanted: Any, vp_stage: int | None = None) -> Any:
        train = valid = None
        if wanted[0] != 0 and not args.skip_train:
            source = images(options, "train", model)
            varied = Squares(options, side, channels, source.most)
            train = TrainingSamples(source, varied, args.seed, wanted[0])
        if wanted[1] != 0:
            source = images(options, "valid", model)
            measured["valid"] = Detections(source)
            valid = ValidationSamples(
                source, Whole(source, side, channels), args.seed, *rounds(args, wanted[1], len(source))
            )
        return train, valid, None

    def whole() -> dict[str, float]:
        return measured["valid"].scores(kinds, mpu.get_data_parallel_group())

    units = {"loss": "summed losses per image", **dict.fromkeys(LOSSES, "loss per image")}
    units |= {f"{kind}_{name}": "average precision" for kind in kinds for name in PLACES}
    return Task(step, datasets, units | {"skipped": "unreadable files per image"}, whole=whole)


def images(options: DetectOptions, split: str, model: Any) -> CocoImages:
    """The images of `train` or `valid`."""
    folder, file = getattr(options, split), getattr(options, f"{split}_file")
    masks, channels = model.heads.masks, model.backbone.image_channels
    return CocoImages(Path(folder), Path(file), channels, masks, annotated=split == "train")
