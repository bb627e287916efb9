"""The same images from a folder, from tar files and from parquet files; broken ones; classes that do not fit."""

import io
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ext.errors import DataError
from megatron_ext.vision.images import Images
from megatron_ext.vision.sources import Folder, Parquet, Source, Tars, open_source

NAMES = ("bird", "cat", "dog")


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


PICTURES = [(picture(i), i % 3) for i in range(6)]
BROKEN = PICTURES[4][0][:60]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rows of parquet files are laid down here, and not where the user's are."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same six pictures of three classes three times, the fifth of them broken."""
    import datasets

    root = tmp_path_factory.mktemp("sources")
    pictures = [(BROKEN if i == 4 else data, label) for i, (data, label) in enumerate(PICTURES)]
    for i, (data, label) in enumerate(pictures):
        (root / "folder" / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (root / "folder" / NAMES[label] / f"{i}.png").write_bytes(data)
    (root / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(root / "tars" / f"{shard}.tar", "w") as tar:
            for i in range(3 * shard, 3 * shard + 3):
                for ending, data in (("png", pictures[i][0]), ("cls", str(pictures[i][1]).encode())):
                    member = tarfile.TarInfo(f"some/{i}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (root / "parquet").mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    columns = {"image": [{"bytes": data, "path": None} for data, _ in pictures], "label": [one for _, one in pictures]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(root / "parquet" / "0.parquet")
    return {name: root / name for name in ("folder", "tars", "parquet")}


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.mark.parametrize(("kind", "of"), [("folder", Folder), ("tars", Tars), ("parquet", Parquet)])
def test_the_same_images_from_each(
    sources: dict[str, Path], kind: str, of: type[Source], caplog: pytest.LogCaptureFixture
) -> None:
    """Every pixel and label; the broken one is named once, and counted on the one after it."""
    source = open_source(sources[kind])
    assert isinstance(source, of)
    assert len(source) == 6
    assert len(source.classes) == 3
    images = Images(source, to_tensor, 3, seed=0, count=12)
    with caplog.at_level(logging.WARNING):
        samples = [images[i] for i in range(12)]
    found = {(bytes(s["image"].byte().numpy()), int(s["label"])) for s in samples}
    expected = {
        (bytes(to_tensor(Image.open(io.BytesIO(data))).byte().numpy()), label)
        for i, (data, label) in enumerate(PICTURES) if i != 4
    }  # fmt: skip
    assert found == expected
    assert sum(int(s["skipped"]) for s in samples) == 2
    named = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(named) == 1
    assert {"folder": "cat/4.png", "tars": "some/4.png", "parquet": "row 4"}[kind] in named[0]


def test_shuffling_is_a_permutation_of_each_epoch(sources: dict[str, Path]) -> None:
    images = Images(open_source(sources["folder"]), to_tensor, 3, seed=1, count=12, shuffled=True)
    orders = [[images._at(epoch, place) for place in range(6)] for epoch in range(2)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert orders[0] != orders[1]


def test_classes_are_those_of_training(sources: dict[str, Path], tmp_path: Path) -> None:
    known = {"dog": 0, "cat": 1, "bird": 2}
    for kind in ("folder", "parquet"):
        source = open_source(sources[kind], known)
        assert source.classes == known
        assert sorted(source.label(i) for i in range(6)) == [0, 0, 1, 1, 2, 2]
        with pytest.raises(DataError, match="classes that training does not have"):
            open_source(sources[kind], {"cat": 0})
    with pytest.raises(DataError, match="classes that training does not have"):
        open_source(sources["tars"], {"0": 0, "1": 1})


def test_what_cannot_be_read_at_all_is_told(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no images"):
        open_source(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"no tar, but long enough for a header" * 40)
    with pytest.raises(DataError, match="a tar file cannot be read"):
        open_source(tmp_path)
    (tmp_path / "0.tar").rename(tmp_path / "0.parquet")
    with pytest.raises(DataError, match="parquet files cannot be read"):
        open_source(tmp_path)
    (tmp_path / "0.parquet").unlink()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="no image here can be read"):
        Images(open_source(tmp_path), to_tensor, 3, seed=0)[0]
