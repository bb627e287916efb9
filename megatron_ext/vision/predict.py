"""`megatron-ext vision predict`: the likeliest classes of pictures, printed, and drawn beside them."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from megatron_ext.checkpoint.atomic import check_new_file
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.vision import loading
from megatron_ext.vision.images import MODES
from megatron_ext.vision.loading import Loaded
from megatron_ext.vision.sources import ENDINGS

DRAWN, BARS, COLUMNS = 24, 3, 4  # pictures, classes of each, and pictures in a row of the drawing
LONGEST = 22  # letters of a name in it


@dataclass(frozen=True)
class Prediction:
    """What a picture shows.

    Attributes:
        path: The picture.
        classes: The likeliest ones, by name, the likeliest first.
        shares: Their probabilities.
    """

    path: Path
    classes: list[str]
    shares: list[float]


def main(args: argparse.Namespace) -> None:
    """Print the classes of each picture."""
    if args.top < 1:
        raise ConfigError("--top", got=args.top, legal="at least 1")
    if args.picture is not None:
        if args.picture.suffix.lower() != ".png":
            raise ConfigError("--picture is a PNG", got=args.picture, legal="FILE.png")
        check_new_file(args.picture, "--picture")
    paths = find_pictures(args.images)
    loaded = loading.load(args)
    transform = loading.transform_of(loaded)
    found: list[Prediction] = []
    for first in range(0, len(paths), args.batch_size):
        own = paths[first : first + args.batch_size]
        pictures = [read_picture(path, loaded.network.model.image_channels) for path in own]
        for prediction in predict(loaded, own, torch.stack([transform(picture) for picture in pictures]), args.top):
            found.append(prediction)
            print(_line(prediction, args.json), flush=True)
    if args.picture is not None:
        draw(found[:DRAWN], args.picture)
        print(f"wrote {args.picture}", file=sys.stderr, flush=True)  # not among the predictions


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """Pictures by their paths, and those below folders in order of their names.

    Raises:
        DataError: A path leads nowhere, or a folder has none.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError("no such picture", got=path)
        own = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS) if path.is_dir() else [path]
        if not own:
            raise DataError("no pictures in the folder", got=path, legal=" ".join(ENDINGS))
        found += own
    for path in found:  # before the network is read; what lies deeper in a file is found when its turn comes
        _opened(path).close()
    return found


def read_picture(path: Path, channels: int) -> Any:
    """A picture in the colours of a network.

    Raises:
        DataError: It is damaged, or none.
    """
    with _opened(path) as picture:
        try:
            return picture.convert(MODES[channels])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError("the picture cannot be read", got=f"{path}: {error}") from error


def _opened(path: Path) -> Any:
    try:
        return Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError("this is no picture that can be read", got=f"{path}: {error}") from error


@torch.no_grad()
def predict(loaded: Loaded, paths: Sequence[Path], images: Tensor, top: int) -> list[Prediction]:
    """The likeliest classes of images (b, c, h, w)."""
    shares = loaded.network(images.to(loaded.device)).float().softmax(-1)
    best = shares.topk(min(top, shares.shape[1]))
    return [
        Prediction(path, [loaded.name(number) for number in numbers], own)
        for path, numbers, own in zip(paths, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _line(prediction: Prediction, as_json: bool) -> str:
    pairs = list(zip(prediction.classes, prediction.shares, strict=True))
    if as_json:
        return json.dumps({"image": str(prediction.path), "classes": [[name, share] for name, share in pairs]})
    return f"{prediction.path}: " + ", ".join(f"{name} ({share:.1%})" for name, share in pairs)


def draw(predictions: Sequence[Prediction], out: Path) -> None:
    """Pictures, each above the bars of its likeliest classes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from megatron_ext.reports.figures import COLORS, GREY, INK, STYLE, save

    columns = min(COLUMNS, len(predictions))
    rows = -(-len(predictions) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.6 * columns, 2.9 * rows), layout="constrained")
        axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.2, 1] * rows)
        for ax in axes.flat:
            ax.axis("off")
        for number, prediction in enumerate(predictions):
            row, column = divmod(number, columns)
            above, below = axes[2 * row, column], axes[2 * row + 1, column]
            with Image.open(prediction.path) as picture:
                picture.thumbnail((400, 400))
                above.imshow(picture.convert("RGB"))
            above.set_title(_short(prediction.path.name), fontsize=8, loc="center", color=GREY, weight="normal", pad=4)
            names, shares = prediction.classes[:BARS], prediction.shares[:BARS]
            below.set(xlim=(0, 1), ylim=(BARS - 0.5, -0.5))
            below.barh(
                range(len(names)), shares, height=0.85, color=[COLORS["distilled"], "#BBD3E5", "#BBD3E5"][: len(names)]
            )
            for place, (name, share) in enumerate(zip(names, shares, strict=True)):
                inside = place == 0 and share > 0.75
                text = f"{_short(name)}: {share:.0%}"
                below.text(
                    0.02 if inside else share + 0.02, place, text, va="center", fontsize=8,
                    color="white" if inside else INK,
                )  # fmt: skip
        save(figure, out)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 3] + "..."
