"""The loss of each token of a language model in training, made without its logits, in the place of Megatron's.

Megatron makes the logits of all tokens, and from them, over several passes, what its backward needs: of 1,024 tokens
and 49,152 words 200 MB each time, which on a CPU is written and read by one core. Here a chunk of logits is made,
compared while it is in the cache, and turned into its own gradient (`fused_loss`); the gradients of states and weights
are made with it, for the weights that the mask gives the tokens. What arrives in the backward pass is these weights
times one number, as `training.step.masked_sum` makes it; if it is anything else, the logits are made again.

Shapes: s sequence, b micro-batch, n = s b tokens, h hidden, v this rank's columns of the padded vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from megatron_ext.lm_head.fused_loss import Comparison, Gradients, LMHead, run_chunks
from megatron_ext.lm_head.hidden_states import head, hidden_states
from megatron_ext.lm_head.losses import cross_entropy_in_torch
from megatron_ext.lm_head.objective import Objective
from megatron_ext.lm_head.vocab_parallel import VocabParallel
from megatron_ext.models.loss_buffers import KEPT
from megatron_ext.platform.device import device_type
from megatron_ext.platform.main_grad import add_to_main_grad, main_grad


def token_losses(
    model: LMHead, labels: Int[Tensor, "s b"], mask: Float[Tensor, "s b"] | None, vocabulary: VocabParallel
) -> Float[Tensor, "s b"]:
    """The cross entropy of each token with the next one, in nats; padding counts, as Megatron's does.

    Under tensor parallelism the gradient of `model.hidden` is this rank's part of a sum.

    Args:
        model: What its logits are made of.
        labels: The next tokens, numbered over the whole vocabulary.
        mask: What each loss will be multiplied with, but for a common factor; it changes the speed alone. By default 1.
        vocabulary: This rank's columns.
    """
    weights = torch.ones(labels.shape, device=labels.device) if mask is None else mask.float()
    gradient = torch.is_grad_enabled() and (model.hidden.requires_grad or model.weight.requires_grad)
    what = Comparison(None, labels.flatten(), _ALONE, vocabulary, cross_entropy_in_torch, model.softcap)
    args = (model.hidden.flatten(0, 1), model.weight, weights.flatten(), what, gradient)
    return _TokenLosses.apply(*args).view(labels.shape)  # type: ignore[union-attr]


_ALONE = Objective(kd_weight=0.0, ce_weight=1.0)


class _TokenLosses(torch.autograd.Function):
    """Losses (n,) from states (n, h) and weights (v, h)."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, mask, comparison, gradient):
        gradients = None
        if gradient and 4 * weight.numel() <= KEPT[hidden.device.type]:
            gradients = Gradients(torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32))
        _, losses, _ = run_chunks(hidden, weight, mask, comparison, gradients)
        if gradient:
            ctx.save_for_backward(hidden, mask, *(gradients or ()))
            ctx.weight, ctx.comparison = weight, comparison
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        (arrived,), weight = grad_outputs, ctx.weight
        hidden, mask, *kept = ctx.saved_tensors
        place = mask.abs().argmax()
        factor = arrived[place] / mask[place]
        if kept and torch.allclose(arrived, mask * factor, rtol=1e-6, atol=0.0):
            found = Gradients(kept[0].mul_(factor), kept[1].mul_(factor))
            return found.hidden, add_to_main_grad(weight, found.weight), None, None, None
        main = main_grad(weight)
        found = Gradients(torch.empty_like(hidden), torch.zeros_like(weight) if main is None else main)
        run_chunks(hidden, weight, arrived, ctx.comparison, found)
        return found.hidden, add_to_main_grad(weight, None if main is not None else found.weight), None, None, None


def attach(model: HybridModel) -> None:
    """Let a model on a CPU answer labels with `token_losses`, unless someone looks at its logits.

    Args:
        model: A pipeline stage; nothing changes on a GPU, where Megatron's kernels are fast, where Megatron's own
            fused loss is asked for, or where the stage predicts more than the next token.
    """
    config: Any = model.config
    other = model.mtp_process or model.position_embedding_type == "yarn" or config.cross_entropy_loss_fusion
    if device_type() != "cpu" or not model.post_process or other:
        return
    plain: Callable[..., Tensor] = model.forward

    def forward(
        input_ids: Tensor | None, position_ids: Tensor | None, attention_mask: Tensor | None, *args: Any,
        labels: Tensor | None = None, loss_mask: Tensor | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        looked_at = len(model.output_layer._forward_hooks) > 0
        if labels is None or args or looked_at or any(value is not None for value in more.values()):
            return plain(input_ids, position_ids, attention_mask, *args, labels=labels, loss_mask=loss_mask, **more)
        end = head(model, hidden_states(model, input_ids, position_ids, attention_mask))
        columns, group = end.weight.shape[0], model.pg_collection.tp
        vocabulary = VocabParallel(columns, columns * group.size(), group)  # type: ignore[arg-type]
        mask = None if loss_mask is None else loss_mask.T.contiguous()
        return token_losses(end, labels.T.contiguous(), mask, vocabulary).T.contiguous()

    model.forward = forward  # type: ignore[method-assign]
