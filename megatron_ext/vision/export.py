"""`megatron-ext vision export`: a network as ONNX, or as a `torch.export` program, for any number of images.

What is written is run before it gets its name, by onnxruntime or by torch, and must give the network's logits.
"""

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint.atomic import check_new_file, flush
from megatron_ext.checkpoint.outputs import PARTIAL
from megatron_ext.errors import ConfigError, MegatronExtError
from megatron_ext.vision import loading
from megatron_ext.vision.loading import Loaded

OPSET = 18
TOLERANCE = 1e-4  # relative, and absolute
ONE_FILE = 1.8e9  # bytes of weights in an ONNX file, which is a protobuf of 2 GB at most
TRACED, COUNTS = 2, (1, 3)  # images that the graph is made with, and that it is checked with


def main(args: argparse.Namespace) -> None:
    """Write what was asked for, and say how far its logits are from the network's."""
    wanted = {"--onnx": args.onnx, "--torch-export": args.torch_export}
    paths = {flag: path for flag, path in wanted.items() if path is not None}
    if not paths:
        raise ConfigError("nothing to write", legal=" or ".join(f"{flag} FILE" for flag in wanted))
    if args.resolution is not None and args.resolution < 1:
        raise ConfigError("--resolution", got=args.resolution, legal="at least 1")
    for flag, path in paths.items():
        check_new_file(path, flag)
        check_new_file(_data_of(path), flag)
    if len({path.resolve() for path in paths.values()}) < len(paths):
        raise ConfigError("both forms into one file", got=args.onnx, legal="two files")
    if args.onnx is not None:
        _require_onnx()
    loaded = loading.load(args)
    loaded.network.cpu()
    size = args.resolution or loaded.network.model.resolution
    program = exported(loaded, size)
    for flag, path in paths.items():
        writer = write_onnx if flag == "--onnx" else write_program
        difference = write_checked(path, loaded, size, lambda at, writer=writer: writer(program, loaded, at))
        print(f"wrote {path}: {size} x {size} pixels, logits within {difference:.0e} of the network's", flush=True)


def exported(loaded: Loaded, size: int) -> Any:
    """The network as a `torch.export` program for any number of images of that size."""
    images = _images(loaded, size, TRACED)
    dynamic = {"x": {0: torch.export.Dim("images")}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about names of its own
        return torch.export.export(loaded.network, (images,), dynamic_shapes=dynamic)


def write_onnx(program: Any, loaded: Loaded, path: Path) -> Callable[[Tensor], Tensor]:
    """Write ONNX, with the names of classes and how pixels are normalised; what runs it with onnxruntime."""
    import onnxruntime

    made: Any = torch.onnx.export(
        program, (), dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["logits"], verbose=False
    )
    model = loaded.network.model
    normalise: Any = loading.transform_of(loaded)
    said: dict[str, Any] = {name: getattr(normalise.transforms[-1], name).tolist() for name in ("mean", "std")}
    said |= {"crop": loaded.crop, "interpolation": loaded.interpolation, "classes": loaded.names}
    for name, value in said.items():
        made.model.metadata_props[name] = json.dumps(value)
    made.save(path, external_data=4 * model.num_parameters() > ONE_FILE)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_program(program: Any, loaded: Loaded, path: Path) -> Callable[[Tensor], Tensor]:
    """Write a `torch.export` program; what runs it."""
    torch.export.save(program, path)
    return torch.export.load(path).module()


@torch.no_grad()
def write_checked(path: Path, loaded: Loaded, size: int, write: Callable[[Path], Callable[[Tensor], Tensor]]) -> float:
    """Write a file, compare what it gives with the network, and give it its name; the largest difference.

    Raises:
        MegatronExtError: It gives something else; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    largest = 0.0
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent) as folder:
        temporary = Path(folder) / path.name  # by which an ONNX file knows the file of its weights
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = write(temporary)
        for count in COUNTS:
            images = _images(loaded, size, count)
            found, expected = run(images), loaded.network(images)
            difference = (found - expected).abs().max().item()
            if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
                what = "what was exported gives other logits than the network, and is not kept"
                raise MegatronExtError(what, got=f"{path}: {difference:.1e}", legal=f"at most {TOLERANCE:.0e}")
            largest = max(largest, difference)
        check_new_file(path, "the output")  # which another program may have made meanwhile
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):  # the file itself last
            flush(file)
            os.replace(file, path.parent / file.name)
    flush(path.parent)
    return largest


def _images(loaded: Loaded, size: int, count: int) -> Tensor:
    """Random pixels, normalised."""
    return torch.randn(
        count, loaded.network.model.image_channels, size, size, generator=torch.Generator().manual_seed(count)
    )


def _data_of(path: Path) -> Path:
    """Where ONNX keeps weights that are too large for the file itself."""
    return path.with_name(path.name + ".data")


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "ONNX is written and checked by packages", got=error, legal="pip install megatron-ext[vision]"
        ) from None
