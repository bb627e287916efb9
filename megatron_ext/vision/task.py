"""What a network is trained and measured on: images and labels, mixed in pairs in training; loss, top-1 and top-5."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.vision.agreement import FACTOR, disagreement
from megatron_ext.vision.images import Images, Variations, seeded
from megatron_ext.vision.options import ImageOptions, MesaOptions
from megatron_ext.vision.sources import Source, open_source

if TYPE_CHECKING:
    from megatron_ext.training.job import RunConfig
    from megatron_ext.training.step import Sums, Task

SHARE = "share of images"
UNITS = {"loss": "nats per image", "top_1": SHARE, "top_5": SHARE, "skipped": "unreadable files per image"}
AVERAGE_UNITS = {"average_loss": "nats per image", "average_top_1": SHARE}
MESA_UNITS = {"mesa": "nats per image"}


@runtime_checkable
class Lesson(Protocol):
    """What a network learns beside the labels of its images."""

    @property
    def units(self) -> Mapping[str, str]:
        """The unit of each metric that it adds."""
        ...

    def logits(self, network: Any, images: Tensor) -> Tensor:
        """Of another network, which is beside this one, in float32, without a graph."""
        ...

    def losses(self, logits: Tensor, other: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised, and what is logged, summed over images.

        Args:
            logits: The network's (b, classes).
            other: Those of `logits`.
            labels: The cross entropy with the labels, summed.
        """
        ...


def classification(run: "RunConfig", lesson: Lesson | None = None) -> "Task":
    """The task of a validated command line; validation measures the average of the weights, too, if there is one.

    Args:
        run: The command line.
        lesson: What is learned beside the labels.
    """
    from megatron.core.utils import get_attr_wrapped_model

    from megatron_ext.data.schema import BatchSchema, Field
    from megatron_ext.training.step import Task, batch_step

    model: Any = run.model
    options: ImageOptions = run.options["images"]
    seed: int = run.args.seed
    size = (model.image_channels, model.resolution, model.resolution)
    fields = {"image": Field(size, torch.float32)}
    fields |= {name: Field((), torch.int64) for name in ("label", "skipped")}
    decay, mesa = run.options["average"].decay, run.options.get("mesa", MesaOptions())
    mixing, place = Mixing(options, model.classes, seed), Place(run.args)

    def forward(network: Any, batch: dict[str, Tensor]) -> Tensor:
        agrees = decay > 0
        if network.training:
            batch["image"], batch["target"] = mixing(batch["image"], batch["label"], place.first_sample())
            agrees = mesa.weight > 0 and run.args.curr_iteration >= mesa.start * run.args.train_iters
            if decay:
                average: Any = get_attr_wrapped_model(network, "average")
                average.update(run.args.curr_iteration)
        if agrees:
            batch["average"] = network(batch["image"], averaged=True).float()
        if lesson is not None:
            batch["other"] = lesson.logits(network, batch["image"])
        return network(batch["image"])

    def datasets(wanted: Any, vp_stage: int | None = None) -> Any:
        variations = Variations(options, model)
        train, valid = sources(options, getattr(run.args, "ext_classes", None))
        common = {"channels": model.image_channels, "seed": seed}
        return (
            Images(train, variations.training, count=wanted[0], shuffled=True, **common)
            if train and wanted[0] != 0
            else None,
            # Shuffled, too: a validation of some batches would else see the first classes alone.
            Images(valid, variations.validation, count=wanted[1], shuffled=True, **common)
            if valid and wanted[1] != 0
            else None,
            None,
        )

    units = UNITS | (AVERAGE_UNITS if decay else {}) | (MESA_UNITS if mesa.weight else {})
    units |= {} if lesson is None else dict(lesson.units)
    step = batch_step(BatchSchema(fields), forward, partial(losses, mesa=mesa.weight, lesson=lesson))  # type: ignore[arg-type]
    return Task(step, datasets, units)


def losses(batch: Mapping[str, Tensor], logits: Tensor, mesa: float = 0.0, lesson: Lesson | None = None) -> "Sums":
    """Of a micro-batch what is minimised, summed, how many images there are, and each metric's sum and count.

    Args:
        batch: `label` (b,); `target` (b, classes) in training; `average`, the averaged weights' logits; `other`, those
            of the lesson.
        logits: Of the network (b, classes).
        mesa: Weight of the agreement with the averaged weights.
        lesson: What is learned beside the labels.
    """
    logits, label = logits.float(), batch["label"]
    count = label.new_full((), len(label))  # filled there: a GPU is not waited for
    if "target" in batch:
        total = -(batch["target"] * F.log_softmax(logits, -1)).sum()
    else:
        total = F.cross_entropy(logits, label, reduction="sum")
    hits = logits.topk(min(5, logits.shape[-1])).indices == label[:, None]
    found = {"loss": (total, count), "top_1": (hits[:, 0].sum(), count), "top_5": (hits.any(-1).sum(), count)}
    found["skipped"] = batch["skipped"].sum(), count
    if "average" in batch and "target" not in batch:
        found["average_loss"] = F.cross_entropy(batch["average"], label, reduction="sum"), count
        found["average_top_1"] = (batch["average"].argmax(-1) == label).sum(), count
    if lesson is not None:
        total, more = lesson.losses(logits, batch["other"], total)
        found |= {name: (value, count) for name, value in more.items()}
    if mesa:
        apart = disagreement(logits, batch["average"]) if "average" in batch else total.new_zeros(())
        found["mesa"] = apart, count
        total = total + mesa * FACTOR * apart
    return total, count, found


def sources(options: ImageOptions, classes: Sequence[str] | None = None) -> tuple[Source | None, Source | None]:
    """Of training and of validation, with one numbering of classes.

    Args:
        options: Where they lie.
        classes: Names in order of their numbers; by default those of the training images.

    Raises:
        DataError: One is not what it should be.
    """
    known = None if classes is None else {name: number for number, name in enumerate(classes)}
    train = None if options.train is None else open_source(Path(options.train), known)
    known = known if train is None else train.classes
    return train, None if options.valid is None else open_source(Path(options.valid), known)


class Place:
    """Which samples of a run the next micro-batch of this rank is made of, known without asking a GPU.

    Args:
        args: Megatron's, which count the samples.
    """

    def __init__(self, args: Any) -> None:
        self._args, self._consumed, self._micro_batch = args, -1, 0

    def first_sample(self) -> int:
        """The first one's number; each call is one micro-batch of a step, and a step that is run again begins anew."""
        from megatron.core import mpu
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        args = self._args
        if args.consumed_train_samples != self._consumed or self._micro_batch == get_num_microbatches():
            self._consumed, self._micro_batch = args.consumed_train_samples, 0
        ranks = mpu.get_data_parallel_world_size()
        before = self._micro_batch * ranks + mpu.get_data_parallel_rank()
        self._micro_batch += 1
        return self._consumed + before * args.micro_batch_size


class Mixing:
    """Mixup (arXiv 1710.09412), cutmix (arXiv 1905.04899) and smoothed labels, by timm.

    What is mixed depends on the seed and on the batch's first sample alone.
    """

    def __init__(self, options: ImageOptions, classes: int, seed: int) -> None:
        self._options, self._classes, self._seed = options, classes, seed

    def __call__(self, images: Tensor, labels: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Images, mixed, and the share that each has of each class (b, classes)."""
        from timm.data.mixup import Mixup, mixup_target

        if not self._options.mixes:
            return images, mixup_target(labels, self._classes, 1.0, self._options.smoothing)
        mixup = Mixup(
            self._options.mixup,
            self._options.cutmix,
            label_smoothing=self._options.smoothing,
            num_classes=self._classes,
        )
        with seeded(self._seed, index):
            return mixup(images.clone(), labels)
