"""Predictions beside what is right: image, annotation, prediction, a row for each image."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_ext.vision.downstream.colours import normalised
from megatron_ext.vision.downstream.samples import BrokenError
from megatron_ext.vision.segmentation.folders import IGNORED, SegmentationFolder
from megatron_ext.vision.segmentation.upernet import Segmenter, predict
from megatron_ext.vision.segmentation.variations import Whole

GAP = 4
SMALLEST = 128  # pixels of a picture's width; a smaller image is shown several times as large


def palette(classes: int) -> "np.ndarray[Any, Any]":
    """A colour (3,) for each class, far from those before it; the last is black, for pixels without one."""
    from colorsys import hsv_to_rgb

    colours = [hsv_to_rgb(0.618034 * i % 1, 0.55 + 0.4 * (i % 2), 0.95 - 0.3 * (i // 2 % 2)) for i in range(classes)]
    return (np.array([*colours, (0, 0, 0)]) * 255).astype(np.uint8)


@torch.no_grad()
def draw(network: Segmenter, source: SegmentationFolder, shorter: int, count: int, path: Path) -> int:
    """Draw the first readable images of a source; on each map pixels without an annotation are black.

    Returns:
        How many were drawn.
    """
    model, rows = network.backbone.model, []
    whole, colours = Whole(source, shorter, model.image_channels), palette(model.classes)
    for index in range(len(source)):
        if len(rows) == count:
            break
        try:
            annotated = source.read(index)
        except BrokenError:
            continue
        sample = whole(annotated)
        height, width = sample["size"].tolist()[:2]
        image = sample["pixels"][: model.image_channels * height * width].view(1, -1, height, width)
        found = predict(network, normalised(image), annotated.labels.shape).argmax(0).numpy()
        maps = [np.where(each == IGNORED, model.classes, each) for each in (annotated.labels, found)]
        row = [np.array(annotated.image.convert("RGB")), *(colours[each] for each in maps)]
        larger = np.ones((max(1, SMALLEST // row[0].shape[1]),) * 2 + (1,), dtype=np.uint8)
        rows.append([np.kron(each, larger) for each in row])
    if not rows:
        return 0
    height = sum(row[0].shape[0] + GAP for row in rows) - GAP
    width = max(row[0].shape[1] for row in rows) * 3 + 2 * GAP
    sheet, top = np.full((height, width, 3), 255, dtype=np.uint8), 0
    for row in rows:
        for place, picture in enumerate(row):
            left = place * (width + GAP) // 3
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        top += row[0].shape[0] + GAP
    Image.fromarray(sheet).save(path)
    return len(rows)
