"""Average precision: cases with known answers, and a plain formula on random boxes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.vision.detection.coco import CocoImages
from megatron_ext.vision.detection.precision import Detections

Box = tuple[float, float, float, float]


def source(tmp_path: Path, images: list[list[tuple[int, Box, int]]]) -> CocoImages:
    """Of each image the objects: category, left, top, width and height, and whether it is a crowd."""
    annotations = [
        {"id": 0, "image_id": i, "category_id": c, "bbox": list(box), "iscrowd": crowd, "area": box[2] * box[3]}
        for i, own in enumerate(images) for c, box, crowd in own
    ]  # fmt: skip
    file = tmp_path / "some.json"
    shown = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(len(images))]
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    file.write_text(json.dumps({"images": shown, "annotations": annotations, "categories": categories}))
    return CocoImages(tmp_path, file, masks=False)


def found(*each: tuple[int, Box, float]) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h), _ in each]).reshape(-1, 4)
    labels, scores = torch.tensor([label for label, *_ in each]), torch.tensor([score for *_, score in each])
    return {"boxes": boxes, "labels": labels.long(), "scores": scores}


def scores(source: CocoImages, *images: dict[str, torch.Tensor]) -> dict[str, float]:
    detections = Detections(source)
    for index, own in enumerate(images):
        detections.add(index, own)
    result = detections.scores(("box",))
    assert list(detections._found) == [], "it begins again"
    return result


ONE: Box = (10, 10, 40, 40)


@pytest.mark.parametrize(
    ("objects", "detections", "expected"),
    [
        ([(1, ONE, 0)], found((1, ONE, 0.3)), {"box_ap": 1, "box_ap_50": 1}),
        ([(1, ONE, 0)], found((2, ONE, 0.3)), {"box_ap": 0}),
        # Three quarters of the object: an overlap of .75, which is enough at .50 to .75, six of ten.
        ([(1, ONE, 0)], found((1, (10, 10, 30, 40), 0.3)), {"box_ap": 0.6, "box_ap_50": 1, "box_ap_75": 1}),
        # One of two objects is found: recall ends at .5, 51 of 101 points.
        ([(1, ONE, 0), (1, (60, 60, 30, 30), 0)], found((1, ONE, 0.3)), {"box_ap": 51 / 101}),
        # What is wrong and surer halves the precision; what is wrong and less sure costs nothing.
        ([(1, ONE, 0)], found((1, ONE, 0.3), (1, (60, 0, 9, 9), 0.9)), {"box_ap": 0.5}),
        ([(1, ONE, 0)], found((1, ONE, 0.9), (1, (60, 0, 9, 9), 0.3)), {"box_ap": 1}),
        # A crowd is no object, and what lies in it is not wrong.
        ([(1, ONE, 0), (1, (50, 50, 50, 50), 1)], found((1, ONE, 0.3), (1, (60, 60, 9, 9), 0.9)), {"box_ap": 1}),
        ([(1, ONE, 0)], found(), {"box_ap": 0}),
        # 40 x 40 is middle, and there is no small or large object.
        ([(1, ONE, 0)], found((1, ONE, 0.3)), {"box_ap_medium": 1, "box_ap_small": math.nan, "box_ap_large": math.nan}),
    ],
)  # fmt: skip
def test_known_answers(tmp_path: Path, objects: Any, detections: Any, expected: dict[str, float]) -> None:
    measured = scores(source(tmp_path, [objects]), detections)
    assert {name: measured[name] for name in expected} == pytest.approx(expected, abs=1e-6, nan_ok=True)


def plain(truth: list[Any], said: list[Any]) -> float:
    """The mean over classes and overlaps of precision at 101 recalls, image by image and box by box."""

    def overlap(a: Box, b: Box) -> float:
        wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        shared = max(0, wide) * max(0, high)
        return shared / (a[2] * a[3] + b[2] * b[3] - shared)

    means = []
    for label in (1, 2):
        count = sum(c == label for own in truth for c, *_ in own)
        for need in np.arange(0.5, 1, 0.05):
            right = []
            for objects, detections in zip(truth, said, strict=True):
                free = [box for c, box, _ in objects if c == label]
                for c, box, score in sorted(detections, key=lambda each: -each[2]):
                    if c != label:
                        continue
                    best = max(free, key=lambda other, box=box: overlap(box, other), default=None)
                    hit = best is not None and overlap(box, best) >= need
                    if hit:
                        free.remove(best)
                    right.append((score, hit))
            right.sort(key=lambda each: -each[0])
            hits = np.cumsum([hit for _, hit in right])
            precision = hits / np.arange(1, len(right) + 1)
            recall = hits / count
            means += [
                max((p for p, r in zip(precision, recall, strict=True) if r >= at), default=0)
                for at in np.linspace(0, 1, 101)
            ]
    return float(np.mean(means))


def test_it_is_the_plain_formula(tmp_path: Path) -> None:
    """On six images of noisy boxes and false ones, of which half are measured on another rank."""
    random = np.random.default_rng(0)
    truth: list[Any] = []
    said: list[Any] = []
    for _ in range(6):
        truth.append([(int(random.integers(1, 3)), tuple(random.uniform(20, 40, 4).tolist()), 0) for _ in range(4)])
        near = [
            (c, tuple((np.array(box) + random.normal(0, 2, 4)).tolist()), random.random()) for c, box, _ in truth[-1]
        ]
        wrong = [
            (int(random.integers(1, 3)), tuple(random.uniform(10, 60, 4).tolist()), random.random()) for _ in range(3)
        ]
        said.append([*near, *wrong])
    measured = scores(source(tmp_path, truth), *(found(*own) for own in said))
    assert measured["box_ap"] == pytest.approx(plain(truth, said), abs=1e-6)


def test_images_that_were_not_looked_at_do_not_count(tmp_path: Path) -> None:
    images = source(tmp_path, [[(1, ONE, 0)], [(1, ONE, 0)]])
    assert scores(images, found((1, ONE, 0.5)))["box_ap"] == pytest.approx(1)
    assert math.isnan(Detections(images).scores(("box",))["box_ap"])


def test_masks_are_measured_as_masks(tmp_path: Path) -> None:
    """A triangle's mask in a square's box: the box is right, the mask is half."""
    images = source(tmp_path, [[(1, (0, 0, 40, 40), 0)]])
    images.objects[0][0]["segmentation"] = [[0, 0, 40, 0, 40, 40, 0, 40]]
    own = found((1, (0, 0, 40, 40), 0.5))
    own["masks"] = torch.zeros(1, 100, 100, dtype=torch.bool)
    own["masks"][0, :40, :40] = torch.ones(40, 40).triu() > 0
    detections = Detections(images)
    detections.add(0, own)
    measured = detections.scores(("box", "mask"))
    assert measured["box_ap"] == pytest.approx(1)
    assert measured["mask_ap"] == pytest.approx(0.1)  # 820 of 1600 pixels: enough at .50 alone
