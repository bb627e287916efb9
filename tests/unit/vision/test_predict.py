"""`megatron-ext vision predict`: the classes are the network's, the picture has all of them, what is none is told."""

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
    """Weights that tell noise apart, and three pictures of it."""
    path, generator = tmp_path_factory.mktemp("predict"), np.random.default_rng(0)
    torch.manual_seed(0)
    network = Network(PRESETS["mambavision-nano"])
    torch.nn.init.normal_(network.head.weight)  # type: ignore[arg-type]
    torch.save(to_published(network.state_dict(), network.model), path / "nano.pth.tar")
    (path / "pictures").mkdir()
    for name, mode, shape in (("a.png", "RGB", (50, 40, 3)), ("b.jpg", "L", (32, 32)), ("c.png", "RGBA", (30, 60, 4))):
        pixels = generator.integers(0, 255, shape, dtype=np.uint8)
        Image.fromarray(pixels, mode).save(path / "pictures" / name)
    (path / "text.png").write_text("no picture")
    (path / "names.txt").write_text("\n".join("abcdefghij"))
    return path


def predict(here: Path, *words: str | Path) -> int:
    flags = ["--load", here / "nano.pth.tar", "--preset", "mambavision-nano", "--classes", here / "names.txt"]
    return cli.main(["vision", "predict", *map(str, [*words, *flags])])


def test_the_likeliest_classes_are_the_networks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In any batch; by an order and shares that are worked out here."""
    network = Network(PRESETS["mambavision-nano"]).eval()
    torch.manual_seed(0)
    network = Network(PRESETS["mambavision-nano"]).eval()
    torch.nn.init.normal_(network.head.weight)  # type: ignore[arg-type]
    transform = Variations(ImageOptions(), network.model).validation
    picture = here / "picture.png"
    assert predict(here, here / "pictures", "--json", "--top", "3", "--batch-size", "2", "--picture", picture) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["a.png", "b.jpg", "c.png"]
    for line in lines:
        logits = network(transform(Image.open(line["image"]).convert("RGB"))[None])[0].double()
        shares = (logits - logits.logsumexp(0)).exp().tolist()
        expected = sorted(zip(shares, "abcdefghij", strict=True), reverse=True)[:3]
        assert [name for name, _ in line["classes"]] == [name for _, name in expected]
        assert [share for _, share in line["classes"]] == pytest.approx([share for share, _ in expected], rel=1e-4)
    with Image.open(picture) as drawn:
        assert drawn.width > 3 * 300


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["text.png"], "this is no picture that can be read"),
        (["nowhere.png"], "no such picture"),
        (["empty"], "no pictures in the folder"),
        (["pictures/a.png", "--top", "0"], "--top"),
        (["pictures/a.png", "--picture", "out.gif"], "--picture is a PNG"),
        (["pictures/a.png", "--picture", "text.png"], "exists already and is not overwritten"),
        (["pictures/a.png", "--images-crop", "2"], "--images-crop is a share"),
    ],
)
def test_what_is_wrong_is_told(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], what: str
) -> None:
    monkeypatch.chdir(here)
    Path("empty").mkdir(exist_ok=True)
    assert predict(here, *words) == 2
    out, err = capsys.readouterr()
    assert what in err
    assert out == ""
    assert Path("text.png").read_text() == "no picture"
