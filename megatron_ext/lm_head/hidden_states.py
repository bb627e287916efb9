"""Past the output layer: the hidden states that logits are made of, and the rows they are multiplied with."""

from typing import Any

from jaxtyping import Float, Int
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_ext.lm_head.fused_loss import LMHead
from megatron_ext.platform.gathering import gathered


def hidden_states(
    model: HybridModel, tokens: Int[Tensor, "b s"] | None, positions: Tensor | None, mask: Tensor | None
) -> Float[Tensor, "s b h"]:
    """What a chunk hands on: on the last stage the states after the final norm, instead of logits.

    These are the steps of `HybridModel.forward` before its output layer, which has no door of its own.

    Args:
        model: A pipeline stage of the model.
        tokens: On the first stage.
        positions: On the first stage.
        mask: Of attention; None where it is causal by itself.
    """
    inputs = model.embedding(input_ids=tokens, position_ids=positions) if model.pre_process else None
    rotary: Any = None
    if model.position_embedding_type == "rope":
        decoder: Any = model.decoder
        length = model.rotary_pos_emb.get_rotary_seq_len(None, decoder, inputs, model.config, None)  # type: ignore[arg-type]
        rotary = model.rotary_pos_emb(length)
    return model.decoder(hidden_states=inputs, attention_mask=mask, rotary_pos_emb=rotary)


def head(model: HybridModel, hidden: Float[Tensor, "s b h"]) -> LMHead:
    """The end of a model: its states, whole in the sequence, and this rank's rows of the output layer."""
    groups: Any = model.pg_collection
    # Each rank makes its part of the gradient of `hidden`: on the way back the parts are summed.
    if model.config.sequence_parallel:
        whole = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=groups.tp)
    else:
        whole = copy_to_tensor_model_parallel_region(hidden, group=groups.tp)
    return LMHead(whole, output_weight(model), getattr(model, "logits_softcap", None))


def output_weight(model: HybridModel) -> Float[Tensor, "v h"]:
    """This rank's rows of the output layer or of the embedding that it shares; after `hidden_states`."""
    if model.share_embeddings_and_output_weights and model.pre_process:
        return gathered(model.embedding.word_embeddings).weight
    weight: Any = gathered(model.output_layer).weight
    return weight
