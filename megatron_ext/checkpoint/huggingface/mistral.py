"""`MistralForCausalLM`: Mistral 7B (without sliding window) and Mistral NeMo."""

from typing import Any

from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.llama import ATTENTION, EMBEDDINGS, FINAL_NORM, GATED, GATED_MLP, sizes
from megatron_ext.checkpoint.huggingface.settings import Always, Rope, Tied
from megatron_ext.errors import CheckpointError
from megatron_ext.models.config import Architecture


class NoWindow:
    """Attention sees everything before it: no sliding window, or one as long as the context."""

    def __init__(self, default: int | None, switch: str | None = None) -> None:
        self.default, self.switch = default, switch

    def read(self, config: Config) -> dict[str, Any]:
        """Nothing, but refuses a window."""
        window, context = config.get("sliding_window", self.default), config.get("max_position_embeddings", 0)
        on = self.switch is None or config.get(self.switch, False)
        if on and window is not None and window < context:
            raise CheckpointError(
                "config.json: 'sliding_window' is not supported", got=window,
                legal=f"null, or max_position_embeddings={window} for a context of one window",
            )  # fmt: skip
        kinds = set(config.get("layer_types") or ()) - {"full_attention"}
        if on and kinds:
            raise CheckpointError("config.json: 'layer_types' that are not supported", got=sorted(kinds))
        return {}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """No window, for as many layers as there are."""
        entries: dict[str, Any] = {"sliding_window": None}
        if self.switch is not None:
            entries[self.switch] = False
        if "layer_types" in like:
            entries["layer_types"] = ["full_attention"] * arch.pattern.count("*")
        return entries


MISTRAL = Family(
    "MistralForCausalLM", "mistral", "model.layers.{}", "*-",
    [*EMBEDDINGS, *ATTENTION, *GATED_MLP, *FINAL_NORM],
    [*sizes(131_072), *GATED, Rope(), Tied(), NoWindow(4096), Always(add_bias_linear=False)],
)  # fmt: skip
