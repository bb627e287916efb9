"""A wing of its own on the engine: a classifier of images, with its model, batches, metrics and job.

`python toy_wing.py --toy-width 32 --train-iters 4 ...` is its command line.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from megatron_ext import program
from megatron_ext.errors import ConfigError
from megatron_ext.families.family import DataclassFamily
from megatron_ext.options.fields import option
from megatron_ext.training.job import STOPPABLE, Job, RunConfig
from megatron_ext.training.run_job import run_job

SIDE, CLASSES = 8, 4


@dataclass(frozen=True)
class Classifier:
    """A perceptron with one hidden layer, split over tensor-parallel ranks."""

    width: int = option(32, "Hidden channels.")

    def num_parameters(self) -> int:
        return self.width * (SIDE * SIDE + 1) + CLASSES * (self.width + 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check_layout(self, tp: int) -> None:
        if self.width % tp:
            raise ConfigError("--toy-width does not divide", got=self.width, legal=f"a multiple of {tp}")


def build(config: Any, model: Classifier, groups: Any) -> Any:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.module import MegatronModule

    class Network(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            linear = partial(dict, config=config, init_method=config.init_method, bias=True, tp_group=groups.tp)
            self.first = ColumnParallelLinear(SIDE * SIDE, model.width, gather_output=False, **linear())
            self.last = RowParallelLinear(model.width, CLASSES, input_is_parallel=True, skip_bias_add=False, **linear())

        def set_input_tensor(self, input_tensor: Any) -> None:
            """There is one stage."""

        def forward(self, image: Tensor) -> Tensor:
            return self.last(self.first(image.flatten(1))[0].relu())[0]

    return Network()


class Shapes(Dataset):
    """Bright quarters on noise; the quarter is the class."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        label = index % CLASSES
        image = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(self._seed * 1_000_003 + index))
        row, column = divmod(label, 2)
        image[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 0.5
        return {"image": image, "label": torch.tensor(label)}


def task(run: RunConfig) -> Any:
    from megatron_ext.data.schema import BatchSchema, Field
    from megatron_ext.training.step import Task, batch_step

    def datasets(wanted: Any, vp_stage: int | None = None) -> Any:
        return [
            Shapes(64 if count is None else count, seed) if count != 0 else None for seed, count in enumerate(wanted)
        ]

    def losses(batch: Mapping[str, Tensor], logits: Tensor) -> Any:
        label, count = batch["label"], torch.tensor(len(batch["label"]), device=logits.device)
        total = F.cross_entropy(logits.float(), label, reduction="sum")
        return total, count, {"loss": (total, count), "accuracy": ((logits.argmax(-1) == label).sum(), count)}

    schema = BatchSchema({"image": Field((SIDE, SIDE), torch.float32), "label": Field((), torch.int64)})
    step = batch_step(schema, lambda model, batch: model(batch["image"]), losses)
    return Task(step, datasets, {"loss": "nats per image", "accuracy": "share of images"})


FAMILY = DataclassFamily("toy", Classifier, build, presets={"toy-small": Classifier(16)})
JOB = Job("toy", FAMILY, task=task, defaults=STOPPABLE, measures=1)

if __name__ == "__main__":
    sys.exit(program.main(lambda: run_job(JOB, sys.argv[1:])))
