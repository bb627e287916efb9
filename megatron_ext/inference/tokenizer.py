"""The tokenizer of a checkpoint, and how many of its rows are words."""

from pathlib import Path
from typing import Any

from megatron_ext import platform
from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.checkpoint.tokenizer import check, check_rows, fingerprint
from megatron_ext.errors import DataError


def load_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer.

    Raises:
        DataError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise DataError("no such tokenizer", got=directory, legal=f"a directory with {hf_assets.TOKENIZER}")
    platform.silence_warnings()
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the first broken file makes transformers raise
        raise DataError(f"the tokenizer cannot be loaded: {error}", got=directory) from error


def tokenizer_of(checkpoint: Path, given: Path | None) -> Any:
    """The tokenizer that was given, or the checkpoint's own.

    Raises:
        DataError: There is none, or it cannot be loaded.
        CheckpointError: The checkpoint holds no language model.
        ConfigError: The checkpoint has another one than was given, or fewer tokens.
    """
    step = layout.find(checkpoint).path
    rows = layout.architecture(step).padded_vocab_size
    check(step, given, "the checkpoint")
    found = given or hf_assets.tokenizer(step)
    if found is None:
        raise DataError(
            "the checkpoint has no tokenizer", got=checkpoint, legal=f"--tokenizer DIR, with {hf_assets.TOKENIZER}"
        )
    tokenizer = load_tokenizer(found)
    if given:
        check_rows(len(tokenizer), rows)
    return tokenizer


def vocab_size_of(checkpoint: Path, tokenizer: Any | None) -> int:
    """Entries of a checkpoint's vocabulary, without padding; all rows of its embedding where nothing says.

    What it was converted from says so, or else the tokenizer, and the run that made it.
    """
    step = layout.find(checkpoint).path
    rows = layout.architecture(step).padded_vocab_size
    if folder := hf_assets.assets_of(step):
        return min(rows, hf_assets.read_config(folder).get("vocab_size", rows))
    sizes = [getattr(layout.common(step)["args"], "vocab_size", None), None if tokenizer is None else len(tokenizer)]
    return min([rows, *(size for size in sizes if size is not None)])


def identity(tokenizer: Any) -> str:
    """Tells one tokenizer from another: how many tokens it has, and a hash of what they mean."""
    return f"{len(tokenizer)} tokens, {(fingerprint(Path(tokenizer.name_or_path)) or 'unknown')[:12]}"
