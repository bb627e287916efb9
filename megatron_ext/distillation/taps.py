"""Reading a model's hidden states while it runs."""

from collections.abc import Sequence
from typing import Any

from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from megatron_ext.distillation.states import EMBEDDING, FINAL, Point
from megatron_ext.models.pattern import MOE, Pattern, parse
from megatron_ext.platform.gathering import gathered
from megatron_ext.pruning.importance import FUSED_NORM, pre_norm


def pattern_of(chunk: HybridModel) -> Pattern:
    """The layer pattern of a model, with its pipeline borders."""
    assert chunk.hybrid_layer_pattern is not None
    return parse(chunk.hybrid_layer_pattern)


class Taps:
    """Hooks on one chunk of a model that keep its states at some points, with their graph, until they are taken.

    Args:
        chunk: The chunk.
        points: Points that come to be in this chunk; `final` is the chunk's own output and needs no hook.
    """

    def __init__(self, chunk: HybridModel, points: Sequence[Point]) -> None:
        self._states: dict[Point, Tensor] = {}
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

    def take(self) -> dict[Point, Tensor]:
        """The states of the last run, (s, b, h) each; a second call returns nothing."""
        states, self._states = self._states, {}
        return states

    def _after(self, point: Point):
        def see(module: Any, args: Any, output: Any) -> None:
            self._states[point] = output[0] if isinstance(output, tuple) else output

        return see

    def _before(self, point: Point):
        def see(layer: Any, args: Any, kwargs: Any) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if self._kinds[point.layer] == MOE:
                normed = layer.pre_mlp_layernorm(hidden)
            else:  # the norm is part of the projection behind it
                projection = gathered(layer.get_submodule(FUSED_NORM[self._kinds[point.layer]]))
                normed = pre_norm(projection, hidden, self._config)
            self._states[point] = normed.to(hidden.dtype)

        return see
