"""Past the output layer: the hidden states that logits are made of, and the rows they are multiplied with."""

from typing import Any

from jaxtyping import Float, Int
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

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


def output_weight(model: HybridModel) -> Float[Tensor, "v h"]:
    """This rank's rows of the output layer or of the embedding that it shares; after `hidden_states`."""
    if model.share_embeddings_and_output_weights and model.pre_process:
        return gathered(model.embedding.word_embeddings).weight
    weight: Any = gathered(model.output_layer).weight
    return weight
