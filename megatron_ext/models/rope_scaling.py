"""Scalings of rotary positions, in transformers' words: how fast each pair of channels turns, at which length.

A scaling is a mapping with its kind under `rope_type` and the numbers of `ENTRIES`, none of them left to be derived.
Llama 3.1's, with the numbers that Megatron fixes, is `Architecture.rope_scaling_factor` instead.
"""

from collections.abc import Mapping
from math import log, pi
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_ext.errors import ConfigError

_ORIGINAL = "original_max_position_embeddings"
ENTRIES: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": (_ORIGINAL, "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}
"""What each kind of scaling is described by."""
_LISTS = ("short_factor", "long_factor")


def checked(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """A scaling, its numbers as floats and tuples of floats; an empty one is none.

    Raises:
        ConfigError: It is of an unknown kind, or its entries are not those of its kind.
    """
    if not scaling:
        return {}
    kind = scaling.get("rope_type")
    if kind not in ENTRIES:
        raise ConfigError("unknown scaling of rotary positions", got=kind, legal=", ".join(ENTRIES))
    wanted = ("rope_type", *ENTRIES[kind])
    if set(scaling) != set(wanted):
        raise ConfigError(f"entries of a {kind} scaling", got=", ".join(scaling), legal=", ".join(wanted))
    values: dict[str, Any] = {"rope_type": kind}
    for name in ENTRIES[kind]:
        given = scaling[name]
        try:
            values[name] = tuple(map(float, given)) if name in _LISTS else float(given)
        except (TypeError, ValueError):
            raise ConfigError(f"{name} of a {kind} scaling is no number", got=given) from None
    numbers = [number for name in ENTRIES[kind] for number in (values[name] if name in _LISTS else (values[name],))]
    if not all(0 <= number < float("inf") for number in numbers) or values.get("factor", 1.0) < 1:
        raise ConfigError(f"a {kind} scaling with such numbers", got=dict(scaling), legal="a factor of 1 or more")
    return values


def parse(text: str) -> dict[str, Any]:
    """A scaling from words such as `rope_type=linear factor=4`, numbers of a list with commas between.

    Raises:
        ConfigError: A word is of another form.
    """
    try:
        entries = dict(word.split("=") for word in text.split())
    except ValueError:
        raise ConfigError("--ext-rope-scaling", got=text, legal="rope_type=linear factor=4.0") from None
    return {name: tuple(value.split(",")) if name in _LISTS else value for name, value in entries.items()}


def text(scaling: Mapping[str, Any]) -> str:
    """The words of a scaling; the inverse of `parse`."""
    said = {name: ",".join(map(str, value)) if name in _LISTS else value for name, value in scaling.items()}
    return " ".join(f"{name}={value}" for name, value in said.items())


def attention_factor(scaling: Mapping[str, Any]) -> float:
    """What rotated channels of queries and keys are multiplied by."""
    return scaling.get("attention_factor", 1.0)


def inverse_frequencies(
    scaling: Mapping[str, Any], base: float, channels: int, length: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " half"]:
    """Radians that each pair of channels turns from one position to the next.

    Args:
        scaling: How they are scaled.
        base: Of the geometric series.
        channels: Of a head, as many as are rotated.
        length: Of the sequence, on which some scalings depend.
        dtype: Of the numbers, which are calculated in it.
    """
    kind = scaling.get("rope_type")
    if kind == "dynamic" and length > scaling[_ORIGINAL]:  # as transformers' Llama: its base grows with the sequence
        grown = scaling["factor"] * length / scaling[_ORIGINAL] - (scaling["factor"] - 1)
        base = base * grown ** (channels / (channels - 2))
    periods = base ** (torch.arange(0, channels, 2, dtype=dtype) / channels)
    if kind == "linear":
        return 1 / periods / scaling["factor"]
    if kind == "longrope":
        name = "long_factor" if length > scaling[_ORIGINAL] else "short_factor"
        return 1 / (torch.tensor(scaling[name], dtype=dtype) * periods)
    if kind == "yarn":
        return _yarn(scaling, base, channels, periods)
    if kind == "llama3":
        return _llama3(scaling, periods)
    return 1 / periods


def _yarn(scaling: Mapping[str, Any], base: float, channels: int, periods: Tensor) -> Tensor:
    """Fast channels as they are, slow ones interpolated, a ramp between (arXiv 2309.00071, section 3.2)."""

    def channel(rotations: float) -> float:
        return channels * log(scaling[_ORIGINAL] / (rotations * 2 * pi)) / (2 * log(base))

    low, high = channel(scaling["beta_fast"]), channel(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = low // 1, -(-high // 1)
    low, high = max(low, 0), min(high, channels - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(len(periods), dtype=periods.dtype) - low) / width).clamp(0, 1)
    return 1 / (scaling["factor"] * periods) * ramp + 1 / periods * (1 - ramp)


def _llama3(scaling: Mapping[str, Any], periods: Tensor) -> Tensor:
    """Channels that turn often within the original length as they are, slow ones divided, a blend between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling[_ORIGINAL] / (2 * pi * periods)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / periods * ((1 - share) / scaling["factor"] + share)
