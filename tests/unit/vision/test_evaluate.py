"""`megatron-ext vision evaluate`: counts of all images that can be read, each once, whatever the batches are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ext import cli
from megatron_ext.vision.images import Variations
from megatron_ext.vision.network import Network
from megatron_ext.vision.options import ImageOptions
from megatron_ext.vision.presets import PRESETS
from megatron_ext.vision.weights import to_published


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, and pictures of six classes of which the first, one within and the last cannot be read."""
    path, generator = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    torch.manual_seed(0)
    network = Network(PRESETS["mambavision-nano"])
    torch.nn.init.normal_(network.head.weight)  # type: ignore[arg-type]
    torch.save(to_published(network.state_dict(), network.model), path / "nano.pth.tar")
    for index in range(24):
        file = path / "pictures" / f"{index // 4}" / f"{index % 4}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (36, 32, 3), dtype=np.uint8)).save(file)
        if index in (0, 9, 23):
            file.write_bytes(file.read_bytes()[:60])
    return path


def evaluate(here: Path, *words: str | Path) -> int:
    flags = ["--load", here / "nano.pth.tar", "--preset", "mambavision-nano", "--images-valid", here / "pictures"]
    return cli.main(["vision", "evaluate", *map(str, [*flags, *words])])


@pytest.mark.parametrize("batch", ["5", "32"])
def test_every_image_counts_once(here: Path, batch: str) -> None:
    torch.manual_seed(0)
    network = Network(PRESETS["mambavision-nano"]).eval()
    torch.nn.init.normal_(network.head.weight)  # type: ignore[arg-type]
    transform = Variations(ImageOptions(), network.model).validation
    right = among = total = 0
    loss = 0.0
    for file in sorted((here / "pictures").rglob("*.png")):
        if file.stat().st_size > 60:
            logits = network(transform(Image.open(file))[None])[0].double()
            label, order = int(file.parent.name), logits.argsort(descending=True).tolist()
            right, among, total = right + (order[0] == label), among + (label in order[:5]), total + 1
            loss -= (logits[label] - logits.logsumexp(0)).item()
    assert evaluate(here, "--batch-size", batch, "--save", here / f"out-{batch}") == 0
    content = json.loads((here / f"out-{batch}" / "results.json").read_text())
    found = content["images"]["weights"]
    assert (found["images"], found["unreadable"]) == (21, 3) == (total, 3)
    assert (found["right"], found["among_5"]) == (right, among)
    assert (found["top_1"], found["top_5"]) == (right / 21, among / 21)
    assert found["loss"] == pytest.approx(loss / 21, rel=1e-5)
    assert content["checkpoint"]["architecture"]["family"] == "mambavision"


def test_results_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A crop that differs is told; each way of measuring is kept."""
    for name, crop in (("one", "1.0"), ("two", "0.9")):
        assert evaluate(here, "--save", here / name, "--images-crop", crop) == 0
    assert evaluate(here, "--save", here / "two", "--images-crop", "0.8") == 0
    assert (
        json.loads((here / "two" / "results.json").read_text())["earlier"]["images/weights"][0]["settings"]["crop"]
        == 0.9
    )
    capsys.readouterr()
    assert cli.main(["compare", str(here / "one"), str(here / "two"), "--out", str(here / "comparison")]) == 0
    page = (here / "comparison" / "comparison.md").read_text()
    assert "images: top-1 of 21 (unequal crop 1.0 \\| 0.8)" in page
    assert (here / "comparison" / "comparison.png").is_file()


def test_what_is_wrong_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = here / "names.txt"
    names.write_text("\n".join("abcdefghij"))
    for words, what in (
        ([], "results of a published file need a place"),
        (["--save", here / "out", "--images-valid", here / "nowhere"], "no such folder of images"),
        (["--save", here / "out", "--images-crop", "0"], "--images-crop is a share"),
        (["--save", here / "pictures"], "the directory is not empty and holds no results"),
        (["--save", here / "out", "--classes", names], "classes that training does not have"),
    ):
        assert evaluate(here, *words) == 2
        assert what in capsys.readouterr().err
    assert not (here / "out").exists()
