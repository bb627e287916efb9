"""Coloured shapes on a noisy ground, with class maps, boxes and outlines: small sets that a tiny network can learn.

    python -m megatron_ext.vision.downstream.shapes DIR --images 200 --side 64

Circles, squares and triangles come in any colour, so that only their form tells the class; or, with `--plain`, each in
its own. No two shapes overlap.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

CLASSES = ("ground", "circle", "square", "triangle")  # 1 to 4 in class maps
SPLITS = ("training", "validation")
_ANGLES = {"circle": np.arange(32) / 32, "square": (np.arange(4) + 0.5) / 4, "triangle": np.arange(3) / 3 - 0.25}


class Scene(NamedTuple):
    """An image, and what is on it.

    Attributes:
        image: RGB.
        shapes: Of each shape the name and the corners (n, 2) of its outline, x and y.
    """

    image: Image.Image
    shapes: list[tuple[str, Any]]


def scene(seed: Sequence[int], side: int = 64, plain: bool = False, most: int = 4) -> Scene:
    """One to `most` shapes on a square; the same for the same seed."""
    random = np.random.default_rng(list(seed))
    base = random.integers(30, 130, 3)
    pixels = np.clip(base + random.normal(0, 12, (side, side, 3)), 0, 255).astype(np.uint8)
    shapes, taken = [], []
    for _ in range(random.integers(1, most + 1)):
        radius = random.uniform(0.14, 0.25) * side
        x, y = random.uniform(radius, side - radius, 2)
        if any(np.hypot(x - a, y - b) < radius + r + 2 for a, b, r in taken):
            continue
        taken.append((x, y, radius))
        name = CLASSES[random.integers(1, len(CLASSES))]
        turns = _ANGLES[name] * 2 * np.pi
        outline = np.stack([x + radius * np.cos(turns), y + radius * np.sin(turns)], 1)
        colour = random.integers(0, 255, 3)
        colour[random.integers(3)] = 255
        if plain:
            colour = np.full(3, 40) + 200 * (np.arange(1, 4) == CLASSES.index(name))
        pixels[inside(outline, side)] = colour
        shapes.append((name, outline))
    return Scene(Image.fromarray(pixels), shapes)


def inside(outline: "np.ndarray[Any, Any]", side: int) -> "np.ndarray[Any, Any]":
    """The pixels (side, side) whose middle lies in a convex outline (n, 2), whose corners go clockwise on the image."""
    x, y = np.meshgrid(np.arange(side) + 0.5, np.arange(side) + 0.5)
    edges = np.roll(outline, -1, 0) - outline
    turns = edges[:, :1, None] * (y - outline[:, 1:, None]) - edges[:, 1:, None] * (x - outline[:, :1, None])
    return (turns >= 0).all(0)


def write_shapes(root: Path, images: int = 200, side: int = 64, plain: bool = False, seed: int = 0) -> None:
    """Write a set for segmentation and detection: so many images for training, a quarter as many for validation.

    Args:
        root: Gets images/SPLIT/NAME.png, annotations/SPLIT/NAME.png with class numbers from 1, and SPLIT.json in the
            format of COCO with the shapes alone, whose categories are 1 to 3.
        images: For training.
        side: Of the squares.
        plain: Whether each class has its colour.
        seed: The same seed gives the same files.
    """
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES) if number]
    for split, name in enumerate(SPLITS):
        coco: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        for kind in ("images", "annotations"):
            (root / kind / name).mkdir(parents=True, exist_ok=True)
        for index in range(images if split == 0 else -(-images // 4)):
            found, file = scene((seed, split, index), side, plain), f"{index:05d}.png"
            found.image.save(root / "images" / name / file)
            labels = np.ones((side, side), dtype=np.uint8)
            coco["images"].append({"id": index + 1, "file_name": file, "width": side, "height": side})
            for shape, outline in found.shapes:
                category = CLASSES.index(shape)
                labels[inside(outline, side)] = category + 1
                low, high = outline.min(0), outline.max(0)
                x, y = outline.T
                area = abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2
                coco["annotations"].append(
                    {
                        "id": len(coco["annotations"]) + 1, "image_id": index + 1, "category_id": category,
                        "bbox": [*low.tolist(), *(high - low).tolist()], "area": area, "iscrowd": 0,
                        "segmentation": [outline.flatten().tolist()],
                    }
                )  # fmt: skip
            Image.fromarray(labels).save(root / "annotations" / name / file)
        (root / f"{name}.json").write_text(json.dumps(coco))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--images", type=int, default=200, help="for training; a quarter as many for validation")
    parser.add_argument("--side", type=int, default=64, help="of the square images")
    parser.add_argument("--plain", action="store_true", help="each class has its colour")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_shapes(given.root, given.images, given.side, given.plain, given.seed)
