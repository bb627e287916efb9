"""A task: data, and a step from a batch to named sums, the same in training, validation and `--skip-train`."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers
from torch import Tensor

from megatron_ext.data.batch import text_batch, text_datasets
from megatron_ext.data.schema import BatchSchema
from megatron_ext.training.extra_models import ExtraModel


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
        extra_models: Models beside it that the step needs.
        whole: Called on all ranks after a validation's last batch: the metrics that are no ratio of sums.
    """

    forward_step: Callable[..., Any]
    datasets: Callable[..., Any]
    units: Mapping[str, str]
    extra_models: Sequence[ExtraModel] = ()
    whole: Callable[[], Mapping[str, float]] | None = None


Sums = tuple[Tensor, Tensor, Mapping[str, tuple[Tensor, Tensor]]]
Losses = Callable[[Mapping[str, Tensor], Any], Sums]


def batch_step(
    schema: BatchSchema, forward: Callable[[torch.nn.Module, Mapping[str, Tensor]], Any], losses: Losses
) -> Callable[..., Any]:
    """Megatron's `forward_step_func` for a model whose batches are named tensors.

    Args:
        schema: What a batch is made of.
        forward: The model's output on a batch, of which a pipeline stage has the tensors that it uses.
        losses: From batch and output of the last stage to what is minimised (a sum with a gradient), its count, and by
            name each metric's sum and count.
    """

    def step(data: Iterator[Mapping[str, Tensor]] | None, model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        args: Any = get_args()
        timers: Any = get_timers()
        timer = timers("batch-generator", log_level=2)
        timer.start()
        micro_batch = args.micro_batch_size if model.training else args.eval_micro_batch_size
        vp_stage: Any = get_attr_wrapped_model(model, "vp_stage")
        batch = schema.read(data, micro_batch, vp_stage)
        timer.stop()

        def loss(output: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            total, count, sums = losses(batch, output)
            pairs = {name: torch.stack([part.detach().float() for part in pair]) for name, pair in sums.items()}
            return total, count.to(torch.int), pairs

        return forward(model, batch), loss

    return step


def masked_sum(batch: Mapping[str, Tensor], losses: Float[Tensor, "b s"]) -> Sums:
    """Of a language model's losses the sum over unmasked tokens, and how many they are."""
    mask = batch["loss_mask"].reshape(-1).float()
    total, count = torch.sum(losses.reshape(-1).float() * mask), mask.sum().to(torch.int)
    return total, count, {"lm loss": (total, count)}


def language_modelling(args: Namespace, losses: Losses = masked_sum, identified: bool = False) -> Task:
    """The next token of Megatron's text data sets.

    Args:
        args: Megatron's validated arguments.
        losses: Of a batch and of what the model makes of it.
        identified: Whether the model takes `sample_id`, which says of the last stage's sequences which they are.
    """
    schema = text_batch(args.seq_length, args.padded_vocab_size, identified)

    def forward(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Any:
        labels = {name: batch.get(name) for name in ("labels", "loss_mask", *["sample_id"] * identified)}
        return model(batch.get("tokens"), batch.get("position_ids"), None, **labels)  # causal: no mask is needed

    return Task(batch_step(schema, forward, losses), text_datasets(args), {"loss": "nats per token"})
