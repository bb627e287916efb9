"""Where labelled images come from: a folder for each class, webdataset's tar files, or Hugging Face's parquet files.

    Folder    CLASS/NAME.jpg; the classes are the folders, in order of their names
    Tars      *.tar with KEY.jpg and KEY.cls, the number of its class, one after the other
    Parquet   *.parquet with a column of images and one of labels

Each image can be read by itself, in any order, so a run may shuffle all of them and resume anywhere.
"""

import tarfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_ext.errors import ConfigError, DataError

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Source(ABC):
    """Labelled images.

    Attributes:
        root: Where they lie.
        classes: The numbers of classes by name.
    """

    root: Path
    classes: dict[str, int]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def label(self, index: int) -> int:
        """The number of an image's class."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Which image it is, for people."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The image's file.

        Raises:
            OSError: It cannot be read.
        """


def open_source(root: Path, classes: Mapping[str, int] | None = None) -> Source:
    """The images below a folder, of the kind that it holds.

    Args:
        root: The folder.
        classes: The numbers of classes by name, where they are those of another source.

    Raises:
        DataError: There is no such folder, no image in it, or a class that the other source does not have.
        ConfigError: What reads it is not installed.
    """
    if not root.is_dir():
        raise DataError("no such folder of images", got=root, legal="a folder with a folder for each class")
    kind = Tars if any(root.glob("*.tar")) else Parquet if any(root.glob("*.parquet")) else Folder
    source = kind(root, classes)
    if len(source) == 0:
        legal = f"CLASS/NAME with one of {' '.join(ENDINGS)}, or tar or parquet files"
        raise DataError("no images", got=root, legal=legal)
    return source


def _numbered(names: list[str], classes: Mapping[str, int] | None, root: Path) -> dict[str, int]:
    """Numbers of classes, in order of their names or as they are known.

    Raises:
        DataError: One is not known.
    """
    if classes is None:
        return {name: number for number, name in enumerate(names)}
    if unknown := [name for name in names if name not in classes]:
        raise DataError("classes that training does not have", got=f"{root}: {', '.join(unknown[:3])}")
    return dict(classes)


class Folder(Source):
    """A folder with a folder for each class."""

    def __init__(self, root: Path, classes: Mapping[str, int] | None = None) -> None:
        names = sorted(path.name for path in root.iterdir() if path.is_dir())
        self.root, self.classes = root, _numbered(names, classes, root)
        self._files = [
            (path, self.classes[name])
            for name in names
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in ENDINGS
        ]

    def __len__(self) -> int:
        return len(self._files)

    def label(self, index: int) -> int:
        """The folder's number."""
        return self._files[index][1]

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self._files[index][0])

    def read(self, index: int) -> bytes:
        """The file."""
        return self._files[index][0].read_bytes()


class Tars(Source):
    """webdataset's tar files. Their tables of contents are read once; images are then read where they lie."""

    def __init__(self, root: Path, classes: Mapping[str, int] | None = None) -> None:
        self.root = root
        self._parts: list[tuple[Path, str, int, int, int]] = []  # tar, name, offset, size, label
        for path in sorted(root.glob("*.tar")):
            self._parts += _contents(path)
        largest = max((part[-1] for part in self._parts), default=-1)
        self.classes = _numbered([str(number) for number in range(largest + 1)], classes, root)

    def __len__(self) -> int:
        return len(self._parts)

    def label(self, index: int) -> int:
        """The number in its .cls."""
        return self._parts[index][-1]

    def name(self, index: int) -> str:
        """The tar and the name in it."""
        return f"{self._parts[index][0]}: {self._parts[index][1]}"

    def read(self, index: int) -> bytes:
        """Its bytes in the tar."""
        path, _, offset, size, _ = self._parts[index]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _contents(path: Path) -> list[tuple[Path, str, int, int, int]]:
    """The images of a tar that have a label."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, ending = member.name.rpartition("/")[2].partition(".")
                key = f"{PurePosixPath(member.name).parent}/{key}"
                if f".{ending.lower()}" in ENDINGS:
                    images[key] = member.name, member.offset_data, member.size
                elif ending == "cls" and (text := tar.extractfile(member)) is not None:
                    labels[key] = int(text.read())
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError("a tar file cannot be read", got=f"{path}: {error}", legal="KEY.jpg and KEY.cls") from error
    return [(path, *images[key], labels[key]) for key in images if key in labels]


class Parquet(Source):
    """Hugging Face's parquet files, by `datasets`, which lays their rows down once where each can be read by itself."""

    def __init__(self, root: Path, classes: Mapping[str, int] | None = None) -> None:
        try:
            import datasets
        except ImportError as error:
            legal = "pip install megatron-ext[vision]"
            raise ConfigError("parquet files are read by datasets", got=error, legal=legal) from None
        self.root = root
        files: list[Any] = [str(path) for path in sorted(root.glob("*.parquet"))]
        try:
            rows: Any = datasets.Dataset.from_parquet(files)
        except Exception as error:  # whatever pyarrow raises of a file that is none
            raise DataError("parquet files cannot be read", got=f"{root}: {error}") from error
        self._image = next((name for name in ("image", "img") if name in rows.column_names), None)
        self._label = next((name for name in ("label", "labels", "fine_label") if name in rows.column_names), None)
        if self._image is None or self._label is None:
            raise DataError("no columns of images and labels", got=rows.column_names, legal="image and label")
        named: Any = rows.features[self._label]
        self._labels: list[int] = rows[self._label][:]
        largest = max(self._labels, default=-1)
        names = getattr(named, "names", None) or [str(number) for number in range(largest + 1)]
        self.classes = _numbered(names, classes, root)
        self._number = [self.classes[name] for name in names]
        self._rows = rows.select_columns([self._image]).cast_column(self._image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._rows)

    def label(self, index: int) -> int:
        """The number in its column, by the name that it has."""
        return self._number[self._labels[index]]

    def name(self, index: int) -> str:
        """The folder and the row."""
        return f"{self.root}: row {index}"

    def read(self, index: int) -> bytes:
        """The bytes in its column."""
        found = self._rows[index][self._image]
        if found is None or found["bytes"] is None:
            raise OSError("the row has no image")
        return found["bytes"]
