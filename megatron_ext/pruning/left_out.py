"""Sub-layers that are left out: the identity on the residual stream, on any parallel layout."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Sublayers(Protocol):
    """What a model is to those who leave parts of it out: an `Architecture`, or another family's list of blocks."""

    @property
    def pattern(self) -> str:
        """One letter for each sub-layer, its kind."""
        ...

    @property
    def layers(self) -> Any:
        """Which has `blocks`: the sub-layers of each block."""
        ...


class LeftOut:
    """Wrappers on the sub-layers of one rank, which can be told to hand on what comes in.

    Args:
        chunks: This rank's `HybridModel`s, unwrapped, in evaluation mode; of another family what `_sublayers` knows.
        architecture: The whole model.

    Attributes:
        calls: How often each sub-layer of this rank has run.
    """

    def __init__(self, chunks: Iterable[Any], architecture: Sublayers) -> None:
        self.architecture = architecture
        self.calls: dict[int, int] = dict.fromkeys(range(len(architecture.pattern)), 0)
        self._chunks = list(chunks)
        self._dropped: frozenset[int] = frozenset()
        self._undo: list[Callable[[], None]] = []
        for chunk in self._chunks:
            for index, layer in self._sublayers(chunk):
                self._wrap(chunk, index, layer)

    @contextmanager
    def without(self, units: Iterable[int]) -> Iterator[None]:
        """The model without these sub-layers, whatever runs it in this block."""
        before, self._dropped = self._dropped, frozenset(units)
        try:
            yield
        finally:
            self._dropped = before

    def remove(self) -> None:
        """Take the wrappers off the model."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _sublayers(self, chunk: Any) -> Iterable[tuple[int, Any]]:
        """Those of a chunk, with their numbers in the whole model."""
        return [(layer.layer_number - 1, layer) for layer in chunk.decoder.layers]

    def _enter(self, chunk: Any, index: int, hidden_states: Tensor) -> Tensor:
        """What a sub-layer gets instead of what comes in."""
        return hidden_states

    def _passes(self, index: int) -> bool:
        """Whether a sub-layer does nothing."""
        return index in self._dropped

    def _wrap(self, chunk: Any, index: int, layer: Any) -> None:
        from megatron.core.transformer.transformer_layer import TransformerLayer

        plain = layer.forward
        paired = isinstance(layer, TransformerLayer)  # returns (hidden states, context)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            hidden_states = self._enter(chunk, index, hidden_states)
            if self._passes(index):
                return (hidden_states, None) if paired else hidden_states
            self.calls[index] += 1
            return plain(hidden_states, *args, **kwargs)

        layer.forward = forward
        self._undo.append(lambda: delattr(layer, "forward"))
