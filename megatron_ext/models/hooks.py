"""Forward hooks that record the hidden states of a model while it runs."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.models.pattern import ATTENTION, EMBEDDING, FINAL, MAMBA, MLP, MOE, LayerOutput, Pattern, parse
from megatron_ext.platform.gathering import gathered

# Of each kind of sub-layer, the projection that its pre-norm is fused into.
FUSED_NORM = {MAMBA: "mixer.in_proj", ATTENTION: "self_attention.linear_qkv", MLP: "mlp.linear_fc1"}


def pre_norm(linear: torch.nn.Module, x: Tensor, config: Any) -> Tensor:
    """The output of the norm that is fused into a projection, if one is, from the projection's input, (..., h) both.

    Transformer Engine and plain torch keep the norm's parameters under the same names.
    """
    weight: Any = getattr(linear, "layer_norm_weight", None)
    if weight is None:  # a model without norms before its sub-layers
        return x.float()
    bias: Any = getattr(linear, "layer_norm_bias", None)
    gamma = weight.float() + 1 if config.layernorm_zero_centered_gamma else weight.float()
    if config.normalization == "RMSNorm":
        return F.rms_norm(x.float(), gamma.shape, gamma, config.layernorm_epsilon)
    return F.layer_norm(x.float(), gamma.shape, gamma, bias.float(), config.layernorm_epsilon)


def pattern_of(chunk: Any) -> Pattern:
    """The layer pattern of a model, with its pipeline borders."""
    assert chunk.hybrid_layer_pattern is not None
    return parse(chunk.hybrid_layer_pattern)


class HiddenStateRecorder:
    """Hooks on one chunk of a model that keep its states at some points, with their graph, until they are taken.

    Args:
        chunk: The chunk.
        points: Points that come to be in this chunk; `final` is the chunk's own output and needs no hook.
    """

    def __init__(self, chunk: Any, points: Sequence[LayerOutput]) -> None:
        self._states: dict[LayerOutput, Tensor] = {}
        self._config, self._kinds = chunk.config, pattern_of(chunk).units
        decoder: Any = chunk.decoder
        layers: dict[int, Any] = {layer.layer_number - 1: layer for layer in decoder.layers}
        for point in points:
            if point.kind == EMBEDDING:
                chunk.embedding.register_forward_hook(self._after(point))
            elif point.kind == "after":
                layers[point.layer].register_forward_hook(self._after(point))
            elif point.kind == "norm":
                layers[point.layer].register_forward_pre_hook(self._before(point), with_kwargs=True)
            else:
                assert point.kind == FINAL

    def take(self) -> dict[LayerOutput, Tensor]:
        """The states of the last run, (s, b, h) each; a second call returns nothing."""
        states, self._states = self._states, {}
        return states

    def _after(self, point: LayerOutput):
        def see(module: Any, args: Any, output: Any) -> None:
            self._states[point] = output[0] if isinstance(output, tuple) else output

        return see

    def _before(self, point: LayerOutput):
        def see(layer: Any, args: Any, kwargs: Any) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if self._kinds[point.layer] == MOE:
                normed = layer.pre_mlp_layernorm(hidden)
            else:  # the norm is part of the projection behind it
                projection = gathered(layer.get_submodule(FUSED_NORM[self._kinds[point.layer]]))
                normed = pre_norm(projection, hidden, self._config)
            self._states[point] = normed.to(hidden.dtype)

        return see
