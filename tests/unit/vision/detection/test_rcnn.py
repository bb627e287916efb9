"""R-CNN on the backbone against torchvision's own, the cascade against a plain loop, and sizes that do not divide."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.ops import roi_align
from vision_oracle import SMALL

from megatron_ext.errors import ConfigError
from megatron_ext.vision.detection.rcnn import Detector, RcnnSizes, detect
from megatron_ext.vision.downstream.family import WithHeads
from megatron_ext.vision.network import PLAIN

SIZES = RcnnSizes(channels=8, hidden=12, anchor=8, proposals=40, sampled=512)


def detector(**sizes: Any) -> Detector:
    torch.manual_seed(0)
    network = Detector(WithHeads(replace(SMALL, classes=2), replace(SIZES, **sizes), lambda _: 0), PLAIN)
    for name, parameter in network.heads.named_parameters():
        if "classify.bias" in name or "cls_score.bias" in name:
            nn.init.normal_(parameter, std=2.0)  # so that something is found
    return network


def wanted() -> list[dict[str, Tensor]]:
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 10:40, 8:44] = 1
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": masks[:0]}
    return [{"boxes": torch.tensor([[8.0, 10, 44, 40]]), "labels": torch.tensor([2]), "masks": masks}, none]


class Features(nn.Module):
    """The backbone and the pyramid, as torchvision's own backbones have it."""

    def __init__(self, network: Detector) -> None:
        super().__init__()
        self.body, self.pyramid, self.out_channels = network.backbone, network.heads.pyramid, SIZES.channels

    def forward(self, images: Tensor) -> Any:
        return self.pyramid(OrderedDict(zip("0123", self.body(images), strict=True)))


def test_without_a_cascade_it_is_torchvisions() -> None:
    """Losses, with an image that has no object, and detections."""
    network = detector(cascade=False)
    heads = network.heads
    theirs = MaskRCNN(
        Features(network), None, min_size=64, max_size=64, image_mean=[0.0] * 3, image_std=[1.0] * 3,
        rpn_anchor_generator=heads.proposals.anchor_generator, rpn_head=heads.proposals.head,
        rpn_pre_nms_top_n_train=80, rpn_pre_nms_top_n_test=40, rpn_post_nms_top_n_train=40, rpn_post_nms_top_n_test=40,
        box_head=heads.boxes.box_head, box_predictor=heads.boxes.box_predictor, box_roi_pool=heads.boxes.box_roi_pool,
        mask_roi_pool=heads.boxes.mask_roi_pool, mask_head=heads.boxes.mask_head,
        mask_predictor=heads.boxes.mask_predictor,
    )  # fmt: skip
    theirs.transform.resize = lambda image, target: (image, target)  # which would do so by interpolation
    images = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    losses = network.train()(images, targets=wanted())
    torch.manual_seed(1)
    expected = theirs.train()(list(images), [dict(each) for each in wanted()])
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    found, right = network.eval()(images), theirs.eval()(list(images))
    assert sum(len(own["boxes"]) for own in right) > 0
    for own, other in zip(found, right, strict=True):
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(own[name], other[name])


@torch.no_grad()
def test_the_cascade_is_a_plain_loop() -> None:
    """On one feature of one image, before anything is suppressed."""
    network = detector(masks=False).eval()
    heads: Any = network.heads.boxes
    heads.score_thresh, heads.nms_thresh, heads.detections_per_img = 0.0, 1.1, 10_000
    features = {name: torch.zeros(1, 8, 1, 1) for name in "123"} | {"0": torch.randn(1, 8, 16, 16)}
    features = {name: features[name] for name in "0123"}
    features |= {"1": torch.zeros(1, 8, 8, 8), "2": torch.zeros(1, 8, 4, 4), "3": torch.zeros(1, 8, 2, 2)}
    boxes = torch.tensor([[4.0, 8, 40, 30], [20, 10, 60, 50]])
    (found,), _ = heads(features, [boxes], [(64, 64)])
    shares = []
    for stage, codes in enumerate(((10, 5), (20, 10), (30, 15))):
        pooled = roi_align(features["0"], [boxes], 7, 1 / 4, 2)
        logits, moves = heads.box_predictor[stage](heads.box_head[stage](pooled))
        shares.append(logits.softmax(1))
        size, middle = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
        middle, size = middle + moves[:, :2] / codes[0] * size, size * (moves[:, 2:] / codes[1]).exp()
        boxes = torch.cat([middle - size / 2, middle + size / 2], 1).clamp(0, 64)
    mean = sum(shares) / 3
    expected = sorted((float(mean[i, c]), c, boxes[i].tolist()) for i in range(2) for c in (1, 2))[::-1]
    assert len(found["scores"]) == 4
    for index, (score, label, box) in enumerate(expected):
        assert found["scores"][index].item() == pytest.approx(score, abs=1e-5)
        assert found["labels"][index] == label
        assert found["boxes"][index].tolist() == pytest.approx(box, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cascade_learns(dtype: torch.dtype) -> None:
    """Each head has its losses, and gradients reach every weight; an image without objects does no harm."""
    network: Detector = detector().to(dtype).train()
    losses = network(torch.randn(2, 3, 64, 64, dtype=dtype), targets=wanted())
    assert {f"loss_{kind}_{stage}" for kind in ("classifier", "box_reg") for stage in range(3)} < losses.keys()
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    missing = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


def test_detections_are_in_the_images_pixels() -> None:
    """Of an image that strides do not divide, scaled back; nothing lies outside."""
    network = detector().eval()
    with torch.no_grad():
        found = detect(network, torch.randn(1, 3, 50, 70), (100, 140))
    assert len(found["boxes"]) > 0
    assert found["masks"].shape == (len(found["boxes"]), 100, 140)
    low, high = found["boxes"].min(0).values, found["boxes"].max(0).values
    assert (low >= 0).all()
    assert (high <= torch.tensor([140.0, 100, 140, 100])).all()
    assert (found["scores"].diff() <= 0).all()


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="--rcnn-anchor is too small"):
        RcnnSizes(anchor=0)
