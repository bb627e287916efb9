"""Layers that differ, in llama.cpp's `deci`: its word for what pruning leaves of a Llama.

A layer without attention has no heads, one without an MLP no neurons. llama.cpp loses the attention of a layer that has
no neurons, and the size of all heads if the first layer has none: such layers get a part of zeros, which adds nothing
to the residual stream, and which is no part of the model when the file is read again.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from megatron_ext.checkpoint.gguf.entries import Config, Described
from megatron_ext.checkpoint.gguf.file import GgufTensor, unpack

DECI = "deci"
NEURONS = 32
"""Of an MLP of zeros: a block of Q8_0."""
_HEADS, _GROUPS, _NEURONS = KEYS = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
_ATTENTION, _MLP = "self_attn", "mlp"
_PARTS = {_ATTENTION: ("attn_", "attn_output.weight"), _MLP: ("ffn_", "ffn_down.weight")}


class LayerSizes:
    """Heads and neurons of each layer."""

    keys = KEYS

    def read(self, given: Described) -> dict[str, Any]:
        """`layer_changes`, and the sizes of all."""
        layers = given.whole("block_count")
        heads, groups, neurons = (given.per_layer(key, layers) for key in KEYS)
        for key, sizes in ((_HEADS, heads), (_GROUPS, groups)):
            if len(set(sizes) - {0}) > 1 or [size == 0 for size in sizes] != [size == 0 for size in heads]:
                raise given.wrong(key, "as many in all layers that have attention")
        changes: list[dict[str, Any]] = []
        for layer in range(layers):
            missing = [*([_ATTENTION] * (not heads[layer])), *([_MLP] * (not neurons[layer]))]
            if len(missing) == 2:
                raise given.wrong(_NEURONS, "attention or an MLP in each layer")
            own = {"intermediate_size": neurons[layer]} if neurons[layer] and len(set(neurons) - {0}) > 1 else {}
            changes.append(({"skip": missing} if missing else {}) | own)
        return {
            "num_attention_heads": max(heads), "num_key_value_heads": max(groups), "intermediate_size": max(neurons),
            "layer_changes": changes,
        }  # fmt: skip

    def write(self, config: Config) -> dict[str, Any]:
        """The three lists, those of parts of zeros in them."""
        zeros = set(_zeros(config))
        sizes: list[tuple[int, int, int]] = []
        for layer, change in enumerate(config["layer_changes"]):
            skipped = change.get("skip", ())
            attention = _ATTENTION not in skipped or (layer, _ATTENTION) in zeros
            neurons = change.get("intermediate_size", config["intermediate_size"])
            if _MLP in skipped:
                neurons = NEURONS
            heads, groups = (
                config[name] if attention else 0 for name in ("num_attention_heads", "num_key_value_heads")
            )
            sizes.append((heads, groups, neurons))
        return {key: list(column) for key, column in zip(KEYS, zip(*sizes, strict=True), strict=True)}


def zero_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of parts of zeros."""
    found: dict[str, tuple[int, ...]] = {}
    if not (missing := list(_zeros(config))):
        return found
    hidden, head = config["hidden_size"], config["head_dim"]
    query, group = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        _ATTENTION: {"attn_norm": (hidden,), "attn_q": (query, hidden), "attn_k": (group, hidden),
                     "attn_v": (group, hidden), "attn_output": (hidden, query)},
        _MLP: {"ffn_norm": (hidden,), "ffn_gate": (NEURONS, hidden), "ffn_up": (NEURONS, hidden),
               "ffn_down": (hidden, NEURONS)},
    }  # fmt: skip
    for layer, part in missing:
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in shapes[part].items()}
    return found


def _zeros(config: Config) -> Iterator[tuple[int, str]]:
    """The layers that get a part of zeros, and which."""
    for layer, change in enumerate(config.get("layer_changes", ())):
        skipped = change.get("skip", ())
        if _MLP in skipped:
            yield layer, _MLP
        if _ATTENTION in skipped and layer == 0:
            yield layer, _ATTENTION


def without_zeros(given: Described) -> Described:
    """What a file says of the model without its parts of zeros."""
    layers = given.whole("block_count")
    sizes = {key: given.per_layer(key, layers) for key in KEYS}
    tensors = dict(given.tensors)
    for layer in range(layers):
        for part, (beginning, last) in _PARTS.items():
            stored = tensors.get(f"blk.{layer}.{last}")
            candidate = layer == 0 if part == _ATTENTION else sizes[_NEURONS][layer] == NEURONS
            if stored is None or not candidate or not _is_zero(stored):
                continue
            for key in KEYS[:2] if part == _ATTENTION else KEYS[2:]:
                sizes[key] = [0 if place == layer else size for place, size in enumerate(sizes[key])]
            tensors = {
                name: tensor for name, tensor in tensors.items() if not name.startswith(f"blk.{layer}.{beginning}")
            }
    own = {f"{given.architecture}.{key}": values for key, values in sizes.items()}
    return replace(given, metadata={**given.metadata, **own}, tensors=tensors)


def of_tensors(given: Described) -> Described:
    """What a file says of layers, with 0 for each part whose tensors are not there."""
    layers = given.whole("block_count")
    own: dict[str, Any] = {}
    for key, part in ((_HEADS, _ATTENTION), (_GROUPS, _ATTENTION), (_NEURONS, _MLP)):
        there = [f"blk.{layer}.{_PARTS[part][1]}" in given.tensors for layer in range(layers)]
        sizes = zip(given.per_layer(key, layers), there, strict=True)
        own[f"{given.architecture}.{key}"] = [size if present else 0 for size, present in sizes]
    return replace(given, metadata={**given.metadata, **own})


def _is_zero(stored: GgufTensor) -> bool:
    values = torch.empty(stored.rows, stored.shape[-1])
    unpack(stored, values)
    return not bool(values.any())
