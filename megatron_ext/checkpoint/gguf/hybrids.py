"""Mamba-2 layers, and patterns of them with attention and MLPs, in llama.cpp's `mamba2` and `nemotron_h`."""

from typing import Any

from megatron_ext.checkpoint.gguf.entries import Config, Described
from megatron_ext.errors import CheckpointError

_WORDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}


class MixerSizes:
    """States, heads and channels of Mamba-2 layers; llama.cpp counts their channels together.

    Args:
        state: The entry of `config.json` for the states.
        heads: The one for the heads.
        channels: The one for the channels of a head.
        expand: Whether `config.json` also has the channels in hidden sizes.
    """

    keys = ("ssm.state_size", "ssm.time_step_rank", "ssm.inner_size")

    def __init__(self, state: str, heads: str, channels: str, expand: bool = False) -> None:
        self.state, self.heads, self.channels, self.expand = state, heads, channels, expand

    def read(self, given: Described) -> dict[str, Any]:
        """The entries."""
        heads, inner = given.whole("ssm.time_step_rank"), given.whole("ssm.inner_size")
        if inner % heads:
            raise given.wrong("ssm.inner_size", f"a multiple of {heads} heads")
        entries = {self.state: given.whole("ssm.state_size"), self.heads: heads, self.channels: inner // heads}
        return entries | ({"expand": inner // given.whole("embedding_length")} if self.expand else {})

    def write(self, config: Config) -> dict[str, Any]:
        """The keys."""
        heads = config[self.heads]
        return dict(zip(self.keys, (config[self.state], heads, heads * config[self.channels]), strict=True))


class HybridLayers:
    """The kind of each layer: one with key/value heads is attention, one with neurons an MLP, any other Mamba-2."""

    keys = ("attention.head_count_kv", "feed_forward_length", "block_count")

    def read(self, given: Described) -> dict[str, Any]:
        """`layers_block_type`, and the sizes."""
        layers = given.whole("block_count")
        groups, neurons = (given.per_layer(key, layers) for key in self.keys[:2])
        for key, sizes in zip(self.keys[:2], (groups, neurons), strict=True):
            if len(set(sizes) - {0}) > 1:
                raise given.wrong(key, "one size in all layers that have it")
        kinds = ["*" if group else "-" if size else "M" for group, size in zip(groups, neurons, strict=True)]
        entries: dict[str, Any] = {"layers_block_type": [_WORDS[kind] for kind in kinds]}
        entries |= {"num_key_value_heads": max(groups)} if max(groups) else {}
        return entries | ({"intermediate_size": max(neurons)} if max(neurons) else {})

    def write(self, config: Config) -> dict[str, Any]:
        """The two lists, and how long they are."""
        kinds = config["layers_block_type"]
        if unknown := sorted(set(kinds) - set(_WORDS.values())):
            raise CheckpointError(
                "llama.cpp's nemotron_h is written without experts", got=", ".join(unknown),
                legal=", ".join(_WORDS.values()),
            )  # fmt: skip
        groups = [config["num_key_value_heads"] if kind == _WORDS["*"] else 0 for kind in kinds]
        neurons = [config["intermediate_size"] if kind == _WORDS["-"] else 0 for kind in kinds]
        return dict(zip(self.keys, (groups, neurons, len(kinds)), strict=True))
