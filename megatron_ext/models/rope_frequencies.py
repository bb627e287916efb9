"""How fast each pair of channels of a head turns with its position, by the scaling of rotary positions."""

from collections.abc import Mapping
from math import log, pi
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_ext.models.rope_scaling import ORIGINAL


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
    if kind == "dynamic" and length > scaling[ORIGINAL]:  # as transformers' Llama: its base grows with the sequence
        grown = scaling["factor"] * length / scaling[ORIGINAL] - (scaling["factor"] - 1)
        base = base * grown ** (channels / (channels - 2))
    periods = base ** (torch.arange(0, channels, 2, dtype=dtype) / channels)
    if kind == "linear":
        return 1 / periods / scaling["factor"]
    if kind == "longrope":
        name = "long_factor" if length > scaling[ORIGINAL] else "short_factor"
        return 1 / (torch.tensor(scaling[name], dtype=dtype) * periods)
    if kind == "yarn":
        return _yarn(scaling, base, channels, periods)
    if kind == "llama3":
        return _llama3(scaling, periods)
    return 1 / periods


def _yarn(scaling: Mapping[str, Any], base: float, channels: int, periods: Tensor) -> Tensor:
    """Fast channels as they are, slow ones interpolated, a ramp between (arXiv 2309.00071, section 3.2)."""

    def channel(rotations: float) -> float:
        return channels * log(scaling[ORIGINAL] / (rotations * 2 * pi)) / (2 * log(base))

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
    turns = scaling[ORIGINAL] / (2 * pi * periods)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / periods * ((1 - share) / scaling["factor"] + share)
