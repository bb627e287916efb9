"""Images and annotations are varied alike: on images that are their own class maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.images import seeded
from megatron_ext.vision.segmentation.folders import IGNORED, Annotated, SegmentationFolder
from megatron_ext.vision.segmentation.options import SegmentOptions
from megatron_ext.vision.segmentation.variations import Crops, Whole

MODEL = MambaVision(pattern="C/C/MS/M", dim=16, head_dim=16, resolution=32, classes=4)


def annotated(height: int = 40, width: int = 56) -> Annotated:
    """Blocks of four colours that say their class: red is 40 times it."""
    labels = np.kron(np.random.default_rng(0).integers(0, 4, (height // 8, width // 8)), np.ones((8, 8), dtype=int))
    pixels = np.stack([labels * 40] * 3, -1).astype(np.uint8)
    return Annotated(Image.fromarray(pixels), labels.astype(np.uint8))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5])
def test_a_crop_shows_what_its_labels_say(scale: float) -> None:
    """But for the borders of blocks, where colours are mixed; what is beyond the image is ignored."""
    crops = Crops(SegmentOptions(smallest=scale, largest=scale, colour=False), MODEL)
    for index in range(6):
        with seeded(0, index):
            sample = crops(annotated())
        pixels, labels = sample["pixels"], sample["labels"]
        assert pixels.shape == (3, 32, 32)
        inside = labels != IGNORED
        near = (pixels[0].float() / 40 - labels.float()).abs() < 0.2
        assert near[inside].float().mean() > (0.4 if scale < 1 else 0.6)
        assert pixels[:, ~inside].sum() == 0
        assert inside.all() == (scale >= 1)


def test_flips_and_colours() -> None:
    """Always and never mirrored are mirror images; colours change, and classes do not."""
    with seeded(0, 0):
        one = Crops(SegmentOptions(smallest=1, largest=1, flip=0.0, colour=False), MODEL)(annotated())
    with seeded(0, 0):
        other = Crops(SegmentOptions(smallest=1, largest=1, flip=1.0, colour=False), MODEL)(annotated())
    assert torch.equal(one["labels"].flip(1), other["labels"])
    assert torch.equal(one["pixels"].flip(2), other["pixels"])
    with seeded(0, 0):
        recoloured = Crops(SegmentOptions(smallest=1, largest=1, flip=0.0), MODEL)(annotated())
    assert torch.equal(recoloured["labels"], one["labels"])
    assert not torch.equal(recoloured["pixels"], one["pixels"])


def test_a_crop_of_one_class_is_drawn_again() -> None:
    labels = np.zeros((64, 64), dtype=np.uint8)
    labels[:, 60:] = 1
    image = Annotated(Image.new("RGB", (64, 64)), labels)
    counts = []
    for share in (1.0, 0.999):
        crops = Crops(SegmentOptions(smallest=2, largest=2, colour=False, one_class=share), MODEL)
        found = []
        for index in range(20):
            with seeded(0, index):
                found.append(len(crops(image)["labels"].unique()))
        counts.append(sum(found))
    assert counts[1] > counts[0]


def test_whole_images_travel_flat(tmp_path: Path) -> None:
    for index, (height, width) in enumerate(((40, 56), (32, 16))):
        image, labels = annotated(height, width)
        for kind, picture in (("images", image), ("annotations", Image.fromarray(labels + 1))):
            (tmp_path / kind / "validation").mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / kind / "validation" / f"{index}.png")
    source = SegmentationFolder(tmp_path, "validation", 4)
    for shorter, sizes in ((0, [(40, 56), (32, 16)]), (20, [(20, 28), (40, 20)])):
        whole = Whole(source, shorter, 3)
        samples = [whole(source.read(index)) for index in range(2)]
        assert len({sample["pixels"].shape for sample in samples}) == 1
        for index, (height, width) in enumerate(sizes):
            image, labels = source.read(index)
            assert samples[index]["size"].tolist() == [height, width, *labels.shape]
            assert torch.equal(samples[index]["labels"][: labels.size].view(labels.shape), torch.from_numpy(labels))
            pixels = samples[index]["pixels"][: 3 * height * width].view(3, height, width)
            expected = np.array(image if shorter == 0 else image.resize((width, height), Image.Resampling.BILINEAR))
            assert torch.equal(pixels, torch.from_numpy(expected).permute(2, 0, 1))
