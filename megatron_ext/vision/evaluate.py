"""`megatron-ext vision evaluate`: top-1, top-5 and loss of a network on labelled images, into `results.json`."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_ext.errors import ConfigError, DataError
from megatron_ext.evaluation.measures.images import AVERAGE, NAME, WEIGHTS, say
from megatron_ext.reports.progress import Progress
from megatron_ext.reports.results import SETTINGS, Results
from megatron_ext.vision import loading
from megatron_ext.vision.images import Images
from megatron_ext.vision.loading import Loaded
from megatron_ext.vision.sources import Source, open_source

LOWEST = 5  # classes that are named


def main(args: argparse.Namespace) -> None:
    """Measure, print, and add to the results."""
    loaded = loading.load(args)
    if loaded.source.is_file() and args.save is None:
        raise ConfigError("results of a published file need a place", got=loaded.source, legal="--save DIR")
    transform = loading.transform_of(loaded)
    results = Results(loaded.source, args.save, about=loaded.about())
    source = open_source(args.images_valid, loaded.numbers)
    if len(source.classes) > loaded.network.model.classes:
        what = "there are more classes than the classifier knows"
        raise DataError(what, got=f"{args.images_valid}: {len(source.classes)}", legal=loaded.network.model.classes)
    found = measure(loaded, source, transform, args.batch_size, args.num_workers)
    lowest = found.pop("by_class")
    which = AVERAGE if args.averaged else WEIGHTS
    results.add(**{NAME: {which: found}})
    print(say(found))
    named = [f"{name} {right} of {count}" for name, (right, count) in lowest.items() if right < count]
    if named:
        print("lowest: " + ", ".join(named[:LOWEST]))
    print(f"wrote {results.directory / 'results.json'}", flush=True)


@torch.no_grad()
def measure(
    loaded: Loaded, source: Source, transform: Callable[[Any], Tensor], batch_size: int, workers: int = 0
) -> dict[str, Any]:
    """Loss, shares and counts over all images of a source that can be read, each once; by class, the lowest first.

    Raises:
        DataError: None can be read.
    """
    model = loaded.network.model
    samples = Images(source, transform, model.image_channels, seed=0)
    loss, top_1, top_5, images = torch.zeros((), dtype=torch.float64), 0, 0, 0
    right, counts = (torch.zeros(model.classes, dtype=torch.int64) for _ in range(2))
    with Progress("evaluating", len(samples)) as progress:
        for batch in DataLoader(samples, batch_size, num_workers=workers):
            # What stands in for an image that cannot be read has a turn of its own.
            own = batch["skipped"] == 0
            progress.advance(len(own))
            if not own.any():
                continue
            label = batch["label"][own]
            logits = loaded.network(batch["image"][own].to(loaded.device)).float().cpu()
            hits = logits.topk(min(5, logits.shape[1])).indices == label[:, None]
            loss += F.cross_entropy(logits.double(), label, reduction="sum")
            top_1, top_5 = top_1 + int(hits[:, 0].sum()), top_5 + int(hits.any(-1).sum())
            images += len(label)
            counts += torch.bincount(label, minlength=model.classes)
            right += torch.bincount(label[hits[:, 0]], minlength=model.classes)
    names = {number: name for name, number in source.classes.items()}
    seen = sorted(counts.nonzero().flatten().tolist(), key=lambda number: (right[number] / counts[number]).item())
    return {
        "loss": loss.item() / images, "top_1": top_1 / images, "top_5": top_5 / images,
        "images": images, "right": top_1, "among_5": top_5, "unreadable": len(samples) - images,
        "by_class": {names.get(n, str(n)): (int(right[n]), int(counts[n])) for n in seen},
        SETTINGS: {
            "data": str(source.root.resolve()), "images": images,
            "resolution": model.resolution, "crop": loaded.crop,
            "interpolation": loaded.interpolation,
            "dtype": "float32",
        },
    }  # fmt: skip
