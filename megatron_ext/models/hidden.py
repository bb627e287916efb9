"""Past the output layer: the hidden states that logits are made of, and the rows they are multiplied with."""

from typing import Any

from jaxtyping import Float
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from megatron_ext.platform.gathering import gathered


def hidden_states(model: HybridModel, *inputs: Any) -> Float[Tensor, "s b h"]:
    """What a chunk hands on: on the last stage the states after the final norm, instead of logits."""
    last = model.post_process
    model.post_process = False  # Megatron's only door past the output layer
    try:
        return model(*inputs)
    finally:
        model.post_process = last


def output_weight(model: HybridModel) -> Float[Tensor, "v h"]:
    """This rank's rows of the output layer or of the embedding that it shares; after `hidden_states`."""
    if model.share_embeddings_and_output_weights and model.pre_process:
        return gathered(model.embedding.word_embeddings).weight
    weight: Any = gathered(model.output_layer).weight
    return weight
