"""Faster and Mask R-CNN of torchvision (arXiv 1506.01497, 1703.06870) on four features, with a pyramid (1612.03144).

Heads compute in float32, also where weights have 16 bits: coordinates of boxes need it, and torchvision's kernels.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from megatron_ext.errors import ConfigError
from megatron_ext.options.fields import option
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.downstream.backbone import Backbone
from megatron_ext.vision.downstream.family import HeadsFamily, WithHeads
from megatron_ext.vision.linears import Linears
from megatron_ext.vision.presets import PRESETS

STRIDE = 32  # of the smallest feature: images are filled up to whole multiples
LEVELS = ("0", "1", "2", "3")


@dataclass(frozen=True)
class RcnnSizes:
    """Sizes of R-CNN's heads."""

    channels: int = option(256, "Channels of the feature pyramid and of the mask head.")
    hidden: int = option(1024, "Hidden channels of a box head.")
    anchor: int = option(32, "Side of the smallest anchors in pixels; those of each level are twice as large.")
    proposals: int = option(1000, "Proposals for an image; in training twice as many are looked at before.")
    sampled: int = option(512, "Proposals for an image that a box head is trained on.")
    cascade: bool = option(True, "Three box heads, one after the other on better boxes, rather than one.")
    masks: bool = option(True, "A mask for each box.")

    def __post_init__(self) -> None:
        """Find what cannot be built.

        Raises:
            ConfigError: Says what.
        """
        for name in ("channels", "hidden", "anchor", "proposals", "sampled"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--rcnn-{name} is too small", got=getattr(self, name), legal="at least 1")


class Heads(nn.Module):
    """Four features to losses or detections.

    Args:
        inputs: Channels of the features.
        sizes: Of the heads.
        classes: Of objects.
    """

    def __init__(self, inputs: list[int], sizes: RcnnSizes, classes: int) -> None:
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        from megatron_ext.vision.detection.cascade import box_heads

        super().__init__()
        self.pyramid = FeaturePyramidNetwork(inputs, sizes.channels, LastLevelMaxPool())
        sides = tuple((sizes.anchor * 2**level,) for level in range(len(inputs) + 1))
        anchors = AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides))
        kept = {"training": sizes.proposals, "testing": sizes.proposals}
        self.proposals = RegionProposalNetwork(
            anchors, RPNHead(sizes.channels, anchors.num_anchors_per_location()[0]), 0.7, 0.3, 256, 0.5,
            {"training": 2 * sizes.proposals, "testing": sizes.proposals}, kept, 0.7,
        )  # fmt: skip
        self.boxes = box_heads(sizes, classes)

    def forward(self, features: Sequence[Tensor], images: Tensor, targets: Any = None) -> tuple[Any, dict[str, Tensor]]:
        """Detections of each image (empty in training), and losses by name (empty in evaluation)."""
        from torchvision.models.detection.image_list import ImageList

        size = (images.shape[2], images.shape[3])
        levels = self.pyramid(OrderedDict(zip(LEVELS, features, strict=True)))
        proposals, losses = self.proposals(ImageList(images, [size] * len(images)), levels, targets)
        found, more = self.boxes(levels, proposals, [size] * len(images), targets)
        return found, losses | more


class Detector(nn.Module):
    """A backbone and R-CNN's heads.

    Args:
        model: Backbone and sizes of the heads.
        linears: How the backbone's linear layers are made.
    """

    def __init__(self, model: WithHeads, linears: Linears) -> None:
        super().__init__()
        self.backbone = Backbone(model.backbone, linears)
        inputs = [model.backbone.channels(index) for index in range(4)]
        self.heads = Heads(inputs, model.heads, model.backbone.classes)

    def forward(self, images: Float[Tensor, "b c h w"], targets: Any = None) -> Any:
        """Losses by name in training; in evaluation the detections of each image.

        Args:
            images: Normalised, of sides that are multiples of `STRIDE`.
            targets: In training of each image `boxes` (n, 4), left, top, right and bottom, `labels` (n,) from 1, and
                with masks `masks` (n, h, w).
        """
        features = [feature.float() for feature in self.backbone(images)]
        weights = {name: value.float() for name, value in self.heads.named_parameters()}
        found, losses = functional_call(self.heads, weights, (features, images.float(), targets))
        return losses if self.training else found


def make(model: WithHeads, linears: Linears) -> Detector:
    """The network of a description."""
    return Detector(model, linears)


class DetectorFamily(HeadsFamily):
    """Backbones with R-CNN's heads, which need torchvision."""

    def from_args(self, args: Any) -> WithHeads:
        """The backbone and the heads.

        Raises:
            ConfigError: torchvision is not installed.
        """
        try:
            import torchvision  # noqa: F401
        except ImportError as error:
            legal = "pip install megatron-ext[vision]"
            raise ConfigError("heads of detectors are torchvision's", got=error, legal=legal) from None
        return super().from_args(args)


# COCO's classes, and the longer side of the images that networks are published with, in whole strides.
FAMILY = DetectorFamily("rcnn", RcnnSizes, make, dict[str, MambaVision](PRESETS), {"classes": 80, "resolution": 1280})


def detect(network: Any, image: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """The detections on one normalised image (1, c, h, w), in pixels of another size.

    Returns:
        `boxes` (n, 4), left, top, right, bottom; `scores` (n,), falling; `labels` (n,) from 1; with masks `masks`
        (n, height, width), of which each pixel is in or out.
    """
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    height, width = image.shape[2:]
    (found,) = network(F.pad(image, (0, -width % STRIDE, 0, -height % STRIDE)))
    boxes = found["boxes"].float()
    scale = boxes.new_tensor([size[1] / width, size[0] / height] * 2)
    boxes = torch.minimum(boxes * scale, boxes.new_tensor([size[1], size[0]] * 2))
    there = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)  # not in what was filled up
    result = {"boxes": boxes[there], "scores": found["scores"][there].float(), "labels": found["labels"][there]}
    if "masks" in found:
        result["masks"] = paste_masks_in_image(found["masks"][there], result["boxes"], size)[:, 0] > 0.5
    return result
