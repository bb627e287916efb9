"""`MistralForCausalLM`: Mistral 7B (without sliding window) and Mistral NeMo."""

from typing import Any

from megatron_ext.checkpoint.huggingface.config_mappings import Fixed, Rope, Tied
from megatron_ext.checkpoint.huggingface.entries import flag, whole
from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.llama import ATTENTION, EMBEDDINGS, FINAL_NORM, GATED, GATED_MLP, sizes
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture

_FULL, _SLIDING = "full_attention", "sliding_attention"


class NoWindow:
    """Attention sees everything before it: no sliding window, or one as long as the context.

    Args:
        context: `max_position_embeddings` where it is missing.
        switch: The entry that turns the window on, for the layers that `layer_types` calls so, or else for those from
            `max_window_layers` on; a family without one has the window in all layers.
        missing: `sliding_window` where it is missing.
        by_layer: Whether the window can be that of some layers only.
    """

    def __init__(
        self, context: int, switch: str | None = None, missing: int | None = 4096, by_layer: bool = True
    ) -> None:
        self.context, self.switch, self.missing, self.by_layer = context, switch, missing, by_layer

    def read(self, config: Config) -> dict[str, Any]:
        """Nothing, but refuses a window."""
        kinds = config.get("layer_types") if self.by_layer else None
        if kinds is not None and not (isinstance(kinds, list) and set(map(str, kinds)) <= {_FULL, _SLIDING}):
            raise CheckpointError("config.json: 'layer_types' that are not supported", got=kinds, legal=_FULL)
        given = config.get("sliding_window", self.missing)
        window = None if given is None else whole(config, "sliding_window", given)
        on = self.switch is None or flag(config, self.switch, False)
        if kinds is not None and _SLIDING in kinds and (window is None or not on):
            raise CheckpointError("config.json: 'layer_types' with a window, and no window", got=kinds, legal=_FULL)
        if kinds is not None and self.switch is not None:
            on = _SLIDING in kinds
        elif self.switch is not None and self.by_layer:
            first = 28 if config.get("max_window_layers") is None else config["max_window_layers"]
            on = on and first < whole(config, "num_hidden_layers")
        if on and window is not None and window < whole(config, "max_position_embeddings", self.context):
            raise CheckpointError(
                "config.json: 'sliding_window' is not supported", got=window,
                legal=f"null, or max_position_embeddings={window} for a context of one window",
            )  # fmt: skip
        return {}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """No window, for as many layers as there are."""
        entries: dict[str, Any] = {"sliding_window": None}
        if self.switch is not None:
            entries[self.switch] = False
        if "layer_types" in like:
            entries["layer_types"] = [_FULL] * arch.pattern.count("*")
        return entries


MISTRAL = Family(
    "MistralForCausalLM", "mistral", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *GATED_MLP, *FINAL_NORM],
    [*sizes(131_072, 8), *GATED, Rope(), Tied(), NoWindow(131_072), Fixed(add_bias_linear=False)],
)  # fmt: skip
