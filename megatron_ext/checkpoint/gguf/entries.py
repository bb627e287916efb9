"""Mappings between the metadata of a GGUF file and entries of `config.json`; an architecture is a table of them.

Keys stand here without what each begins with, the architecture's name: `block_count` is `llama.block_count`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext.checkpoint.gguf.file import GgufTensor, unpack
from megatron_ext.errors import CheckpointError

ROPE_FREQUENCIES = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SAME = 1e-4  # relative, of factors that other programs computed in 32 bits

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Described:
    """What a file, or the first of several, says of its model.

    Attributes:
        path: The file.
        metadata: Its metadata.
        tensors: Its tensors.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """`general.architecture`.

        Raises:
            CheckpointError: There is none.
        """
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError("the GGUF file does not say what it is: no general.architecture", got=self.path)
        return name

    def get(self, key: str, default: Any = None) -> Any:
        """The value of one of the architecture's keys."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def whole(self, key: str, default: int | None = None) -> int:
        """The same, a positive whole number.

        Raises:
            CheckpointError: It is missing, or of another kind.
        """
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise self.wrong(key, "a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The same, a number."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not isfinite(value):
            raise self.wrong(key, "a number")
        return float(value)

    def per_layer(self, key: str, layers: int) -> list[int]:
        """The same, one whole number for each layer, as a list or one for all."""
        value = self.get(key)
        values = value if isinstance(value, list) else [value] * layers
        if len(values) != layers or any(type(each) is not int or each < 0 for each in values):
            raise self.wrong(key, f"a whole number, or one for each of {layers} layers")
        return values

    def wrong(self, key: str, legal: str) -> CheckpointError:
        """The error about the value of a key."""
        value = self.get(key)
        what = "is missing" if value is None else "is not supported"
        return CheckpointError(f"GGUF: {self.architecture}.{key} {what}", got=repr(value)[:200], legal=legal)


class Entry(Protocol):
    """One or more keys, and the entries of `config.json` that they mean."""

    @property
    def keys(self) -> Sequence[str]:
        """The keys."""
        ...

    def read(self, given: Described) -> dict[str, Any]:
        """Entries of `config.json`; raises `CheckpointError` for what our models cannot be."""
        ...

    def write(self, config: Config) -> dict[str, Any]:
        """Keys and values; raises `CheckpointError` for what llama.cpp cannot express."""
        ...


class Whole:
    """A whole number; `default` is another entry's key, or a number, where it is missing."""

    def __init__(self, key: str, hf: str, default: str | int | None = None) -> None:
        self.keys, self.hf, self.default = (key,), hf, default

    def read(self, given: Described) -> dict[str, Any]:
        """The entry."""
        default = given.whole(self.default) if isinstance(self.default, str) else self.default
        return {self.hf: given.whole(self.keys[0], default)}

    def write(self, config: Config) -> dict[str, Any]:
        """The key."""
        return {self.keys[0]: config[self.hf]}


class Number:
    """A number that need not be whole."""

    def __init__(self, key: str, hf: str) -> None:
        self.keys, self.hf = (key,), hf

    def read(self, given: Described) -> dict[str, Any]:
        """The entry."""
        return {self.hf: given.number(self.keys[0])}

    def write(self, config: Config) -> dict[str, Any]:
        """The key."""
        return {self.keys[0]: float(config[self.hf])}


class Only:
    """Keys of which our models know these values only, and what is written of them, if anything is."""

    def __init__(self, legal: Mapping[str, Sequence[Any]], written: Config | None = None) -> None:
        self.keys, self.legal, self.written = tuple(legal), legal, dict(written or {})

    def read(self, given: Described) -> dict[str, Any]:
        """Nothing; refuses other values."""
        for key, legal in self.legal.items():
            if (value := given.get(key)) is not None and legal and value not in legal:
                raise given.wrong(key, " or ".join(map(repr, legal)))
        return {}

    def write(self, config: Config) -> dict[str, Any]:
        """The keys that are always so."""
        return dict(self.written)


class Heads:
    """The channels of a head, of which all or a share are rotated; where no key says, a head's part of the width.

    Args:
        partial: Whether a share of them may be.
    """

    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")

    def __init__(self, partial: bool = False) -> None:
        self.partial = partial

    def read(self, given: Described) -> dict[str, Any]:
        """`head_dim`, and the share that is rotated."""
        heads = max(given.per_layer("attention.head_count", given.whole("block_count")))
        if not heads:
            raise given.wrong("attention.head_count", "heads in one layer at least")
        size = given.whole("attention.key_length", given.whole("embedding_length") // heads)
        if given.whole("attention.value_length", size) != size:
            raise given.wrong("attention.value_length", f"attention.key_length={size}")
        rotated = given.whole("rope.dimension_count", size)
        if rotated > size or (rotated != size and not self.partial):
            raise given.wrong("rope.dimension_count", f"all {size} channels of a head")
        return {"head_dim": size, **({"partial_rotary_factor": rotated / size} if self.partial else {})}

    def write(self, config: Config) -> dict[str, Any]:
        """All three."""
        size = config["head_dim"]
        rotated = int(size * config.get("partial_rotary_factor", 1.0))
        return dict(zip(self.keys, (size, size, rotated), strict=True))


class Rotary:
    """The base of rotary positions and their scaling; Llama 3.1's is a tensor of factors, by which it is recognised."""

    keys = ("rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
            "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor")  # fmt: skip

    def read(self, given: Described) -> dict[str, Any]:
        """`rope_theta`, `rope_scaling`."""
        kind, factor = given.get("rope.scaling.type", "none"), given.number("rope.scaling.factor", 1.0)
        if kind not in ("none", "linear") and factor != 1.0:
            raise given.wrong("rope.scaling.type", "none, linear, or Llama 3.1's, the tensor rope_freqs.weight")
        for key in ("rope.scale_linear", "rope.scaling.attn_factor"):
            if given.get(key, 1.0) != 1.0:
                raise given.wrong(key, "1.0")
        base = given.number("rope.freq_base", 10_000.0)
        entries: dict[str, Any] = {"rope_theta": base, "rope_scaling": None}
        if kind == "linear" and factor != 1.0:
            entries["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        if (stored := given.tensors.get(ROPE_FREQUENCIES)) is not None:
            factors = torch.empty(1, stored.shape[-1])
            unpack(stored, factors)
            factor = float(factors.max())
            expected = llama3_factors(base, 2 * stored.shape[-1], factor)
            if len(stored.shape) != 1 or not torch.allclose(factors[0], expected, rtol=_SAME):
                raise CheckpointError(
                    f"GGUF: {ROPE_FREQUENCIES} is no scaling of frequencies that our models have",
                    got=f"factors of {float(factors.min()):g} to {factor:g}",
                    legal=f"Llama 3.1's: {_LLAMA3}, by any factor",
                )  # fmt: skip
            entries["rope_scaling"] = {"rope_type": "llama3", "factor": round(factor, 4), **_LLAMA3}
        return entries

    def write(self, config: Config) -> dict[str, Any]:
        """The base, and what goes with it."""
        scaling = config.get("rope_scaling") or {}
        kind = scaling.get("rope_type")
        if kind not in (None, "linear", "llama3"):
            raise CheckpointError(
                "llama.cpp scales these rotary positions in another way", got=f"rope_type={kind}",
                legal="none, linear, llama3",
            )  # fmt: skip
        keys: dict[str, Any] = {"rope.freq_base": float(config["rope_theta"])}
        if kind == "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
        return keys


def llama3_factors(base: float, channels: int, factor: float, numbers: Config = _LLAMA3) -> Tensor:
    """What Llama 3.1's scaling divides the frequency of each pair of channels by (channels / 2).

    By their wavelength: below a quarter of 8,192 tokens 1, above all of them `factor`, between them a mixture of both
    frequencies (transformers' `_compute_llama3_parameters`). `numbers` are another quarter and another 8,192.
    """
    frequencies = base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    turns = numbers["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    plain = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (plain + (1 - plain) / factor)).float()


class Biases:
    """Biases of some linear layers, which a file's tensors tell, and of which no key speaks.

    Args:
        entries: Each entry of `config.json`, and the end of a tensor's name that is there if it is true.
    """

    keys = ()

    def __init__(self, **entries: str) -> None:
        self.entries = entries

    def read(self, given: Described) -> dict[str, Any]:
        """The entries."""
        return {hf: any(name.endswith(ending) for name in given.tensors) for hf, ending in self.entries.items()}

    def write(self, config: Config) -> dict[str, Any]:
        """Nothing."""
        return {}


class Check:
    """Something that llama.cpp cannot express, though a family of ours can.

    Args:
        holds: Whether a configuration can be expressed.
        what: What it must be.
        got: The entries that say.
    """

    keys = ()

    def __init__(self, holds: Callable[[Config], bool], what: str, *got: str) -> None:
        self.holds, self.what, self.got = holds, what, got

    def read(self, given: Described) -> dict[str, Any]:
        """Nothing."""
        return {}

    def write(self, config: Config) -> dict[str, Any]:
        """Nothing; refuses the others."""
        if not self.holds(config):
            said = ", ".join(f"{name}={config.get(name)!r}" for name in self.got)
            raise CheckpointError(f"llama.cpp cannot run this model: {self.what}", got=said[:300])
        return {}
