"""Scalings of rotary positions, in transformers' words: how fast each pair of channels turns, at which length.

A scaling is a mapping with its kind under `rope_type` and the numbers of `ENTRIES`, none of them left to be derived.
Llama 3.1's, with the numbers that Megatron fixes, is `Architecture.rope_scaling_factor` instead.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ext.errors import ConfigError

ORIGINAL = "original_max_position_embeddings"
ENTRIES: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor", ORIGINAL),
    "yarn": ("factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": (ORIGINAL, "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
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
