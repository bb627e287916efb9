"""Which tokenizer a checkpoint speaks: by what its tokens mean, whatever the files that say so are called.

A run keeps the fingerprint of its tokenizer among the arguments in its checkpoints; a converted checkpoint has the
tokenizer itself beside its steps. Where neither is there, nothing is known.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import xxhash

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.errors import CheckpointError, ConfigError


def fingerprint(directory: Path) -> str | None:
    """A hash of the numbers and texts of a tokenizer's regular tokens, 32 hex digits; None without a `tokenizer.json`.

    Added tokens, such as those of a chat, are left out: they differ between models that share a vocabulary.
    """
    try:
        content = json.loads((directory / hf_assets.TOKENIZER).read_text(encoding="utf-8"))
        vocabulary, added = content["model"]["vocab"], {token["content"] for token in content["added_tokens"]}
        if isinstance(vocabulary, list):  # of pieces with their scores (Unigram)
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        known = sorted((number, token) for token, number in vocabulary.items() if token not in added)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # whoever loads it says what is wrong with it
        return None
    return xxhash.xxh3_128_hexdigest(json.dumps(known).encode())


def given(args: Namespace) -> Path | None:
    """The directory of the tokenizer that a command line names (Megatron's `args`), if it is Hugging Face's."""
    named = getattr(args, "tokenizer_model", None)
    return Path(named) if named and getattr(args, "tokenizer_type", None) == "HuggingFaceTokenizer" else None


def of_run(args: Namespace) -> str | None:
    """The fingerprint of the tokenizer that a command line names, if it can be told."""
    named = given(args)
    return None if named is None else fingerprint(named)


def of_step(step: Path) -> str | None:
    """The fingerprint of the tokenizer of a step, if it says which it is."""
    try:
        args: Any = layout.common(step).get("args")
    except CheckpointError:
        args = None
    if kept := getattr(args, "tokenizer_fingerprint", None):
        return kept
    if folder := hf_assets.assets_of(step):
        return fingerprint(folder)
    named = given(args) if isinstance(args, Namespace) else None
    return fingerprint(named) if named is not None and named.is_absolute() else None


def check_rows(vocab_size: int, rows: int) -> None:
    """Check that a model has a row of its embedding for every token of a tokenizer.

    Raises:
        ConfigError: It has not.
    """
    if vocab_size > rows:
        raise ConfigError(
            "the tokenizer has more tokens than the model has rows for", got=f"a tokenizer of {vocab_size:,} tokens",
            legal=f"{rows:,} tokens at most: the tokenizer that the model was trained with",
        )  # fmt: skip


def check(step: Path, named: Path | None, whose: str) -> bool:
    """Whether a step is sure to speak the tokenizer that a command line names.

    Args:
        step: The step.
        named: The tokenizer's directory; None if there is none.
        whose: What the step is, for an error.

    Raises:
        ConfigError: It speaks another one.
    """
    if named is None:
        return False
    own, other = of_step(step), fingerprint(named)
    if own is None or other is None:
        return False
    if own != other:
        right = hf_assets.tokenizer(step)
        raise ConfigError(
            f"{whose} has another tokenizer: the same numbers mean other tokens",
            got=f"{named}, and {step}",
            legal=f"{right}" if right is not None and fingerprint(right) == own else "the one it was trained with",
        )
    return True
