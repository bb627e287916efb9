"""Detections on images: boxes with classes and scores, and masks, beside what is annotated."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from megatron_ext.vision.detection.coco import CocoImages
from megatron_ext.vision.detection.rcnn import Detector, detect
from megatron_ext.vision.detection.variations import Whole
from megatron_ext.vision.downstream.colours import normalised
from megatron_ext.vision.downstream.samples import BrokenError

GAP, SMALLEST, SURE = 4, 256, 0.5


@torch.no_grad()
def draw(network: Detector, source: CocoImages, side: int, count: int, path: Path) -> int:
    """Draw the first readable images of a source, what is annotated on the left, what is found on the right.

    Returns:
        How many were drawn.
    """
    channels, rows = network.backbone.model.image_channels, []
    whole = Whole(source, side, channels)
    for index in range(len(source)):
        if len(rows) == count:
            break
        try:
            annotated = source.read(index)
        except BrokenError:
            continue
        sample = whole(annotated)
        height, width = sample["size"].tolist()[:2]
        pixels = sample["pixels"][: channels * height * width].view(1, channels, height, width)
        found = detect(network, normalised(pixels), (annotated.image.height, annotated.image.width))
        sure = found["scores"] >= SURE
        own = {name: value[sure].numpy() for name, value in found.items()}
        names = [source.names[source.categories[label - 1]] for label in annotated.labels]
        said = [
            f"{source.names[source.categories[n - 1]]} {s:.2f}"
            for n, s in zip(own["labels"], own["scores"], strict=True)
        ]
        image = annotated.image.convert("RGB")
        rows.append(
            (shown(image, annotated.boxes, annotated.masks, names), shown(image, own["boxes"], own.get("masks"), said))
        )
    if not rows:
        return 0
    wide = max(left.width for left, _ in rows)
    sheet = Image.new("RGB", (2 * wide + GAP, sum(left.height + GAP for left, _ in rows) - GAP), "white")
    top = 0
    for left, right in rows:
        sheet.paste(left, (0, top))
        sheet.paste(right, (wide + GAP, top))
        top += left.height + GAP
    sheet.save(path)
    return len(rows)


def shown(image: Image.Image, boxes: Any, masks: Any, names: list[str]) -> Image.Image:
    """An image with boxes (n, 4), masks (n, h, w) and names, small images several times as large."""
    factor = max(1, SMALLEST // image.width)
    pixels = np.array(image).astype(float)
    if masks is not None:
        for mask in masks:
            pixels[mask.astype(bool)] = 0.5 * pixels[mask.astype(bool)] + 0.5 * np.array([255.0, 255.0, 0.0])
    size = (image.width * factor, image.height * factor)
    larger = Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(larger)
    for box, name in zip(boxes * factor, names, strict=True):
        pen.rectangle([float(each) for each in box], outline="white")
        pen.text((float(box[0]) + 2, float(box[1]) + 1), name, fill="white")
    return larger
