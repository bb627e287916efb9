"""A task: data, and a step from a batch to named sums, the same in training, validation and `--skip-train`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_timers
from torch import Tensor

from megatron_ext.data.batch import build_datasets, get_batch
from megatron_ext.data.schema import BatchSchema


@dataclass(frozen=True)
class Task:
    """What a model is trained and measured on.

    Attributes:
        forward_step: Megatron's `forward_step_func`: from this rank's micro-batches and the model to the model's output
            and a loss function. That returns, of the output, what is minimised summed over the micro-batch, what it is
            divided by, and each metric as a tensor of two: its sum, and what that is divided by. Megatron adds both
            over micro-batches and ranks first, so that no metric depends on the layout. One is named `loss`.
        datasets: Megatron's provider: from the numbers of samples wanted of each split (None: all of one pass) to data
            sets for training, validation and test; it takes `vp_stage`, too.
        units: The unit of each metric.
    """

    forward_step: Callable[..., Any]
    datasets: Callable[..., Any]
    units: Mapping[str, str]


Sums = tuple[Tensor, Tensor, Mapping[str, tuple[Tensor, Tensor]]]


def batch_step(
    schema: BatchSchema,
    forward: Callable[[torch.nn.Module, Mapping[str, Tensor]], Any],
    losses: Callable[[Mapping[str, Tensor], Any], Sums],
) -> Callable[..., Any]:
    """Megatron's `forward_step_func` for a model whose batches are named tensors.

    Args:
        schema: What a batch is made of.
        forward: The model's output on a batch.
        losses: From batch and output to what is minimised (a sum with a gradient), its count, and by name each
            metric's sum and count.
    """

    def step(data: Iterator[Mapping[str, Tensor]] | None, model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        batch = schema.read(data)

        def loss(output: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            total, count, sums = losses(batch, output)
            pairs = {name: torch.stack([part.detach().float() for part in pair]) for name, pair in sums.items()}
            return total, count.to(torch.int), pairs

        return forward(model, batch), loss

    return step


def masked_sum(
    loss_mask: Float[Tensor, "b s"], losses: Float[Tensor, "b s"]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's loss contract: the sum over unmasked tokens, how many they are, and what to log.

    Megatron sums both over micro-batches and over data- and context-parallel ranks before it divides, so the logged
    loss is the mean over tokens whatever the layout.
    """
    mask = loss_mask.reshape(-1).float()
    total = torch.sum(losses.reshape(-1).float() * mask)
    count = mask.sum().clone().detach().to(torch.int)
    return total, count, {"lm loss": torch.cat([total.clone().detach().view(1), count.view(1)])}


def forward_step(
    data: Iterator[dict[str, Any]],
    model: torch.nn.Module,
    loss: Callable[..., Any] = masked_sum,
    batch_of: Callable[..., dict[str, Any]] = get_batch,
) -> tuple[Tensor, Any]:
    """Run the model on the next micro-batch; (output, loss function) as Megatron's schedules expect.

    Args:
        data: This rank's micro-batches.
        model: The model, wrapped as Megatron wraps it.
        loss: From the loss mask and the model's output to Megatron's loss contract (see `masked_sum`).
        batch_of: `get_batch`, or `get_identified_batch` for a model that takes `sample_id`.
    """
    timers: Any = get_timers()
    timer = timers("batch-generator", log_level=2)
    timer.start()
    vp_stage: Any = get_attr_wrapped_model(model, "vp_stage")
    batch = batch_of(data, vp_stage)
    timer.stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        **({"sample_id": batch["sample_id"]} if "sample_id" in batch else {}),
    )
    return output, partial(loss, batch["loss_mask"])


def language_modelling() -> Task:
    """The next token of Megatron's text data sets."""
    return Task(forward_step, build_datasets, {"loss": "nats per token"})
