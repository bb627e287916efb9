"""The flags of the commands that use a trained network, a function for each: known without torch."""

from argparse import ArgumentParser
from pathlib import Path
from typing import get_args

from megatron_ext.vision.options import Interpolation
from megatron_ext.vision.presets import PRESETS


def evaluate(parser: ArgumentParser) -> None:
    """Of `megatron-ext vision evaluate`."""
    _add_network(parser)
    what = "images with their classes: folders by class, or tar or parquet files"
    parser.add_argument("--images-valid", type=Path, required=True, metavar="DIR", help=what)
    _add_images(parser)
    parser.add_argument("--num-workers", type=int, default=0, metavar="N", help="processes that read images")
    parser.add_argument("--save", type=Path, metavar="DIR", help="where results.json goes; by default the checkpoint's")


def predict(parser: ArgumentParser) -> None:
    """Of `megatron-ext vision predict`."""
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="pictures, or folders of them")
    _add_network(parser)
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes of each (default: %(default)s)")
    _add_images(parser)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the first of them with their classes (PNG)")
    parser.add_argument("--json", action="store_true", help="a JSON object for each picture, a line each")


def export(parser: ArgumentParser) -> None:
    """Of `megatron-ext vision export`."""
    _add_network(parser)
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write ONNX there")
    parser.add_argument("--torch-export", type=Path, metavar="FILE", help="write a torch.export program there (.pt2)")
    parser.add_argument("--resolution", type=int, metavar="N", help="side of the images; by default the network's")


def _add_network(parser: ArgumentParser) -> None:
    """The flags of what is loaded."""
    parser.add_argument(
        "--load", type=Path, required=True, metavar="PATH", help="a checkpoint, or a published file of weights"
    )
    parser.add_argument("--preset", metavar="NAME", help="which network a published file is of: " + ", ".join(PRESETS))
    parser.add_argument("--averaged", action="store_true", help="the moving average of a checkpoint's weights")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, a line for each")


def _add_images(parser: ArgumentParser) -> None:
    """The flags of how images are looked at."""
    crop = "of an image's shorter side that is looked at; by default the checkpoint's, or 1"
    parser.add_argument("--images-crop", type=float, metavar="SHARE", help=crop)
    scaling = "how images are scaled; by default as the checkpoint's, or bicubic"
    parser.add_argument("--images-interpolation", choices=get_args(Interpolation), help=scaling)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="at once (default: %(default)s)")
