"""One micro-batch of language modelling: forward, and the sums that Megatron reduces."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_timers
from torch import Tensor

from megatron_ext.data.batch import get_batch


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
