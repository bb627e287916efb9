"""The network that a command works on: of a checkpoint of ours, or of a published file. Its flags, and their errors."""

import argparse
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint import layout
from megatron_ext.errors import ConfigError, DataError, nearest
from megatron_ext.platform import device_type
from megatron_ext.vision.checkpoint import Evaluation, read_evaluation, read_network
from megatron_ext.vision.family import FAMILY
from megatron_ext.vision.images import Variations
from megatron_ext.vision.network import Network
from megatron_ext.vision.options import ImageOptions
from megatron_ext.vision.presets import PRESETS
from megatron_ext.vision.weights import load_published


@dataclass(frozen=True)
class Loaded:
    """A network in evaluation mode, on the device that there is.

    Attributes:
        network: The network.
        source: What its weights were read from: a step of a checkpoint, or a file.
        names: Of its classes, where they are known.
        crop: Share of an image's shorter side that it looks at.
        interpolation: How its images are scaled.
    """

    network: Network
    source: Path
    names: tuple[str, ...] | None = None
    crop: float = 1.0
    interpolation: Any = "bicubic"

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def name(self, number: int) -> str:
        """Of a class; where names are not known, its number."""
        known = self.names is not None and number < len(self.names)
        return self.names[number] if known and self.names is not None else f"class {number}"

    @property
    def numbers(self) -> Mapping[str, int] | None:
        """Of the classes by name, where names are known."""
        return None if self.names is None else {name: number for number, name in enumerate(self.names)}

    def about(self) -> dict[str, Any] | None:
        """Of a published file what `results.json` says of a checkpoint; None of a checkpoint, which says it itself."""
        if self.source.is_dir():
            return None
        model = self.network.model
        described = {"family": FAMILY.name, "num_parameters": model.num_parameters(), **model.to_dict()}
        with self.source.open("rb") as file:
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        path = str(self.source.resolve())
        return {"path": path, "step": self.source.name, "fingerprint": fingerprint, "architecture": described}


def transform_of(loaded: Loaded) -> Callable[[Any], Tensor]:
    """From a picture to the network's pixels (c, h, w).

    Raises:
        ConfigError: timm is not installed.
    """
    options = ImageOptions(crop=loaded.crop, interpolation=loaded.interpolation)
    return Variations(options, loaded.network.model).validation


def load(args: argparse.Namespace) -> Loaded:
    """The network that a command line names.

    Raises:
        ConfigError: Flags do not go together, or there is no such preset.
        CheckpointError: There is no network, or a damaged one.
        DataError: The names of classes cannot be read, or are too many.
    """
    crop = getattr(args, "images_crop", None)
    if crop is not None and not 0 < crop <= 1:
        raise ConfigError("--images-crop is a share", got=crop, legal="more than 0, at most 1")
    path: Path = args.load
    if path.is_file():
        network, source, looks = _published(path, args), path, Evaluation()
    elif args.preset is not None:
        what = "--preset says which network a file of weights is of; a checkpoint says it itself"
        raise ConfigError(what, got=f"{path}, which is no file", legal="no --preset")
    else:
        source = layout.find(path).path
        network, looks = read_network(source, args.averaged), read_evaluation(source)
    names = looks.classes if args.classes is None else _read_names(args.classes)
    if names is not None and len(names) > network.model.classes:
        got = f"{args.classes or source}: {len(names)} names"
        raise DataError("there are more names than classes", got=got, legal=network.model.classes)
    interpolation = getattr(args, "images_interpolation", None) or looks.interpolation
    return Loaded(network.eval().to(device_type()), source, names, crop or looks.crop, interpolation)


def _published(path: Path, args: argparse.Namespace) -> Network:
    if args.averaged:
        raise ConfigError("a published file has no average of its weights", got=f"--averaged of {path}")
    if args.preset is None:
        raise ConfigError("a published file does not say which network it is of", got=path, legal="--preset NAME")
    if args.preset not in PRESETS:
        raise ConfigError(f"unknown preset {args.preset!r}", legal=nearest(args.preset, PRESETS))
    network = Network(PRESETS[args.preset])
    network.load_state_dict(load_published(path, network.model))
    return network


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("names of classes cannot be read", got=f"{path}: {error}") from error
