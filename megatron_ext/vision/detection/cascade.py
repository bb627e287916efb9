"""Heads of boxes and masks: torchvision's, or a cascade of three of its box heads (Cai and Vasconcelos, 1712.00726).

Each head of the cascade is trained on the boxes that the one before has corrected, and asks for a larger overlap before
it takes a box for an object's. In evaluation their probabilities are averaged, on the last one's boxes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.boxes import clip_boxes_to_image

OVERLAPS = (0.5, 0.6, 0.7)
WEIGHTS = (1.0, 0.5, 0.25)  # of the heads' losses
CODES = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
LEVELS = ["0", "1", "2", "3"]


def box_heads(sizes: Any, classes: int) -> RoIHeads:
    """The heads that `rcnn.RcnnSizes` describes, for so many classes of objects."""
    pool = MultiScaleRoIAlign(LEVELS, output_size=7, sampling_ratio=2)
    common: dict[str, Any] = {
        "box_roi_pool": pool, "fg_iou_thresh": 0.5, "bg_iou_thresh": 0.5, "batch_size_per_image": sizes.sampled,
        "positive_fraction": 0.25, "bbox_reg_weights": None, "score_thresh": 0.05, "nms_thresh": 0.5,
        "detections_per_img": 100,
    }  # fmt: skip
    if sizes.masks:
        common["mask_roi_pool"] = MultiScaleRoIAlign(LEVELS, output_size=14, sampling_ratio=2)
        common["mask_head"] = MaskRCNNHeads(sizes.channels, (sizes.channels,) * 4, 1)
        common["mask_predictor"] = MaskRCNNPredictor(sizes.channels, sizes.channels, classes + 1)
    inputs = sizes.channels * 7 * 7
    if not sizes.cascade:
        predict = FastRCNNPredictor(sizes.hidden, classes + 1)
        return RoIHeads(box_head=TwoMLPHead(inputs, sizes.hidden), box_predictor=predict, **common)
    heads = nn.ModuleList(TwoMLPHead(inputs, sizes.hidden) for _ in OVERLAPS)
    predictors = nn.ModuleList(OneBox(sizes.hidden, classes) for _ in OVERLAPS)
    return Cascade(box_head=heads, box_predictor=predictors, **common)


class OneBox(nn.Module):
    """Logits of nothing and of each class, and one correction of the box for all of them."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.classify, self.correct = nn.Linear(inputs, classes + 1), nn.Linear(inputs, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, classes + 1) and (n, 4)."""
        return self.classify(x), self.correct(x)


class Cascade(RoIHeads):
    """Three box heads in place of one; masks are those of torchvision."""

    def forward(self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None) -> Any:  # type: ignore[override]
        """Detections (empty in training) and losses (empty in evaluation)."""
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        losses: dict[str, Tensor] = {}
        first: Any = None
        for stage, weight in enumerate(WEIGHTS):
            self._at(stage)
            proposals, matched, labels, wanted = self.select_training_samples(list(proposals), targets)
            first = first or (proposals, matched, labels)
            logits, corrections = self._head(stage, features, proposals, image_shapes)
            right, wanted = torch.cat(labels), torch.cat(wanted)
            objects = right > 0
            off = F.smooth_l1_loss(corrections[objects], wanted[objects], reduction="sum")
            losses[f"loss_classifier_{stage}"] = weight * F.cross_entropy(logits, right)
            losses[f"loss_box_reg_{stage}"] = weight * off / right.numel()
            proposals = self._corrected(corrections.detach(), proposals, image_shapes)
        if self.has_mask():
            losses["loss_mask"] = self._mask_loss(features, first, image_shapes, targets)
        return [], losses

    def _at(self, stage: int) -> None:
        """Match and code boxes as this head does."""
        self.proposal_matcher = Matcher(OVERLAPS[stage], OVERLAPS[stage], allow_low_quality_matches=False)
        self.box_coder = BoxCoder(CODES[stage])

    def _head(self, stage: int, features: Any, proposals: Any, shapes: Any) -> tuple[Tensor, Tensor]:
        pooled: Any = self.box_roi_pool
        return self.box_predictor[stage](self.box_head[stage](pooled(features, proposals, shapes)))

    def _corrected(self, corrections: Tensor, proposals: list[Tensor], shapes: Any) -> list[Tensor]:
        """The boxes of each image, within it."""
        boxes = self.box_coder.decode(corrections, proposals)[:, 0]
        parts = boxes.split([len(each) for each in proposals])
        return [clip_boxes_to_image(each, shape) for each, shape in zip(parts, shapes, strict=True)]

    def _mask_loss(self, features: Any, sampled: Any, shapes: Any, targets: Any) -> Tensor:
        """On the first head's boxes of objects."""
        proposals, matched, labels = sampled
        chosen = [own > 0 for own in labels]
        boxes = [own[keep] for own, keep in zip(proposals, chosen, strict=True)]
        masks: Any = self._masks(features, boxes, shapes)
        indices = [own[keep] for own, keep in zip(matched, chosen, strict=True)]
        return maskrcnn_loss(masks, boxes, [t["masks"] for t in targets], [t["labels"] for t in targets], indices)

    def _masks(self, features: Any, boxes: list[Tensor], shapes: Any) -> Tensor:
        pool, head, predict = self.mask_roi_pool, self.mask_head, self.mask_predictor
        assert pool is not None
        assert head is not None
        assert predict is not None
        return predict(head(pool(features, boxes, shapes)))

    def _detect(self, features: Any, proposals: list[Tensor], shapes: Any) -> list[dict[str, Tensor]]:
        shares: list[Tensor] = []
        corrections = proposals[0].new_zeros(0)
        for stage in range(len(OVERLAPS)):
            if stage > 0:
                proposals = self._corrected(corrections, proposals, shapes)
            self._at(stage)
            logits, corrections = self._head(stage, features, proposals, shapes)
            shares.append(logits.softmax(-1))
        mean = torch.stack(shares).mean(0)
        # torchvision has a box for each class, and makes the logits probabilities: the mean's logarithm is.
        each = corrections.repeat(1, mean.shape[1])
        boxes, scores, labels = self.postprocess_detections(mean.log(), each, proposals, shapes)
        found = [{"boxes": b, "scores": s, "labels": n} for b, s, n in zip(boxes, scores, labels, strict=True)]
        if self.has_mask():
            masks = maskrcnn_inference(self._masks(features, boxes, shapes), labels)
            for own, mask in zip(found, masks, strict=True):
                own["masks"] = mask
        return found
