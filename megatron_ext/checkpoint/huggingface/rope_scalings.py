"""Scalings of rotary positions between `config.json` and an `Architecture`."""

from math import log, sqrt
from typing import Any

from megatron_ext.checkpoint.huggingface.entries import flag, number, whole
from megatron_ext.checkpoint.huggingface.family import Config
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.rope_scaling import ENTRIES

ORIGINAL = "original_max_position_embeddings"
# Llama 3.1's, which Megatron has a flag for.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}
_FORMER = {"su": "longrope"}


def read_scaling(rope: Config, config: Config, original: int | None = None) -> dict[str, Any]:
    """The fields, with every number that transformers would derive.

    Args:
        rope: All entries about rotary positions.
        config: The configuration.
        original: `original_max_position_embeddings`, where the class has such an entry of its own.

    Raises:
        CheckpointError: The kind is unknown, or a number is missing.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = _FORMER.get(kind, kind)
    if kind == "yarn" and original is not None:  # as Phi-3's class takes it
        kind = "longrope"
    if kind == "default":
        return {"rope_scaling_factor": None}
    if kind not in ENTRIES:
        raise CheckpointError(
            "config.json: this RoPE scaling is not supported", got=kind, legal=", ".join(("default", *ENTRIES))
        )
    context = config.get("max_position_embeddings")
    given: dict[str, Any] = {ORIGINAL: config.get(ORIGINAL, original)}
    if given[ORIGINAL] is None:
        given[ORIGINAL] = rope.get(ORIGINAL, context)
    if kind == "dynamic":
        given[ORIGINAL] = context
    length = whole(given, ORIGINAL)
    if kind == "longrope":
        return {"rope_scaling": _longrope(rope, context, length)}
    factor = number(rope, "factor", None if kind != "yarn" or not context else context / length)
    if factor < 1:
        raise CheckpointError("config.json: the RoPE scaling's 'factor' is below 1", got=factor)
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind != "linear":
        scaling[ORIGINAL] = length
    if kind == "yarn":
        scaling |= _yarn(rope, factor)
    elif kind == "llama3":
        scaling |= {name: number(rope, name) for name in ("low_freq_factor", "high_freq_factor")}
        if all(scaling[name] == value for name, value in _LLAMA3.items()):
            return {"rope_scaling_factor": factor}
    return {"rope_scaling": scaling}


def _yarn(rope: Config, factor: float) -> dict[str, Any]:
    """The rest of YaRN's numbers (arXiv 2309.00071, section 3.4 for the attention factor)."""

    def concentration(scale: float) -> float:
        return 0.1 * scale * log(factor) + 1 if factor > 1 else 1.0

    one, other = (number(rope, name, 0.0) for name in ("mscale", "mscale_all_dim"))
    own = concentration(one) / concentration(other) if one and other else concentration(1.0)
    betas = {name: number(rope, name, usual) or usual for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))}
    truncate = float(flag(rope, "truncate", True))
    return {"attention_factor": number(rope, "attention_factor", own), **betas, "truncate": truncate}


def _longrope(rope: Config, context: Any, length: int) -> dict[str, Any]:
    factor = number(rope, "factor", context / length if context else None)
    own = sqrt(1 + log(factor) / log(length)) if factor > 1 else 1.0
    lists = {}
    for name in ("short_factor", "long_factor"):
        lists[name] = rope.get(name)
        if not isinstance(lists[name], list):
            raise CheckpointError(f"config.json: {name!r} is no list of numbers", got=repr(lists[name]))
    attention = number(rope, "attention_factor", own)
    return {"rope_type": "longrope", ORIGINAL: length, "attention_factor": attention, **lists}


def written_scaling(arch: Architecture) -> dict[str, Any]:
    """The entries of a model's scaling; empty for none.

    Raises:
        CheckpointError: transformers would derive another one.
    """
    if arch.rope_scaling_factor is not None:
        return {"rope_type": "llama3", "factor": arch.rope_scaling_factor, **_LLAMA3}
    scaling: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in arch.rope_scaling.items()
    }
    if ORIGINAL in scaling:
        scaling[ORIGINAL] = int(scaling[ORIGINAL])
    if "truncate" in scaling:
        scaling["truncate"] = bool(scaling["truncate"])
    if scaling.get("rope_type") == "dynamic" and scaling.pop(ORIGINAL) != arch.max_position_embeddings:
        raise CheckpointError(
            "a dynamic RoPE scaling grows from the model's own context", got=arch.max_position_embeddings,
            legal=arch.rope_scaling[ORIGINAL],
        )  # fmt: skip
    return scaling
