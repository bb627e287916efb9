"""How many tokens attention sees: `sliding_window` of `config.json`, and which layers have it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.checkpoint.huggingface.entries import flag, whole
from megatron_ext.checkpoint.huggingface.family import Config
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION

FULL, SLIDING = "full_attention", "sliding_attention"
Kinds = Callable[[Config, int], Sequence[bool]]
"""Which of so many layers have the window."""


def all_layers(config: Config, layers: int) -> list[bool]:
    """Every layer."""
    return [True] * layers


def upper_layers(config: Config, layers: int) -> list[bool]:
    """Those from `max_window_layers` on."""
    first = 28 if config.get("max_window_layers") is None else config["max_window_layers"]
    return [layer >= first for layer in range(layers)]


def all_but_every(usual: int) -> Kinds:
    """All but every so many, `sliding_window_pattern` or as usual."""

    def kinds(config: Config, layers: int) -> list[bool]:
        every = whole(config, "sliding_window_pattern", usual)
        return [(layer + 1) % every > 0 for layer in range(layers)]

    return kinds


@dataclass(frozen=True)
class Window:
    """The sliding window.

    Attributes:
        context: `max_position_embeddings` where it is missing. A window as long as that is none, unless it is None.
        missing: `sliding_window` where it is missing.
        switch: The entry that turns the window on; a family without one always has it.
        kinds: Which layers have it.
        by_layer: Whether `layer_types` says so where there is such an entry.
    """

    context: int | None
    missing: int | None = 4096
    switch: str | None = None
    kinds: Kinds = all_layers
    by_layer: bool = False

    def read(self, config: Config) -> dict[str, Any]:
        """The field."""
        named = config.get("layer_types")
        if named is not None and not (isinstance(named, list) and set(map(str, named)) <= {FULL, SLIDING}):
            raise CheckpointError("config.json: 'layer_types' that are not supported", got=named, legal=FULL)
        given = config.get("sliding_window", self.missing)
        window = 0 if given is None else whole(config, "sliding_window", given)
        on = self.switch is None or flag(config, self.switch, False)
        if named is not None and SLIDING in named and not (window and on):
            raise CheckpointError("config.json: 'layer_types' with a window, and no window", got=named, legal=FULL)
        layers = whole(config, "num_hidden_layers")
        kinds = [name == SLIDING for name in named] if named and self.by_layer else self.kinds(config, layers)
        if not on or (self.context and window >= whole(config, "max_position_embeddings", self.context)):
            window = 0
        if len(kinds) != layers:
            raise CheckpointError("config.json: 'layer_types' is not one for each layer", got=named, legal=layers)
        return {"attention_windows": tuple(window * kind for kind in kinds)}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entries; refuses windows that differ, or those of layers that the family cannot choose."""
        windows = arch.windows_of(range(len(arch.pattern)))
        sizes = sorted(set(windows) - {0})
        if len(sizes) > 1:
            raise CheckpointError("attention layers have windows of different lengths", got=sizes, legal="one length")
        some = bool(sizes) and 0 in windows
        if some and not self.by_layer:
            raise CheckpointError("the class has a window in all layers or none", got=windows)
        entries: dict[str, Any] = {"sliding_window": sizes[0] if sizes else None}
        if self.context is None and not sizes:  # there is always one, whether a layer has it or not
            entries = {"sliding_window": like.get("sliding_window", self.missing)}
        if self.switch is not None:
            entries[self.switch] = bool(sizes)
        if some or "layer_types" in like or (self.context is None or (sizes and self.by_layer)):
            entries["layer_types"] = [SLIDING if window else FULL for window in windows]
        return entries


def layer_types(arch: Architecture, blocks: Sequence[Sequence[int]]) -> list[str]:
    """The kind of each layer of a family whose layers may lack attention.

    Raises:
        CheckpointError: One does, in a model with windows, whose caches would be those of other layers.
    """
    own = [next((unit for unit in units if arch.pattern[unit] == ATTENTION), None) for units in blocks]
    if arch.attention_windows and None in own:
        raise CheckpointError("layers without attention, in a model with sliding windows", got=arch.pattern)
    return [SLIDING if unit is not None and arch.window(unit) else FULL for unit in own]
