"""The tokenizer of a checkpoint, and how many of its rows are words."""

from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.huggingface import companions
from megatron_ext.errors import DataError

FILE = "tokenizer.json"


def find_tokenizer(checkpoint: Path) -> Path | None:
    """The directory of the tokenizer that a checkpoint was converted or trained with; None if it is not there."""
    step = layout.find(checkpoint).path
    folder = companions.beside(step)
    trained_with = getattr(layout.common(step).get("args"), "tokenizer_model", None)
    for found in (folder, Path(trained_with) if trained_with else None):
        if found is not None and (found / FILE).is_file():
            return found
    return None


def load_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer.

    Raises:
        DataError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise DataError("no such tokenizer", got=directory, legal=f"a directory with {FILE}")
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # whatever the first broken file makes transformers raise
        raise DataError(f"the tokenizer cannot be loaded: {error}", got=directory) from error


def tokenizer_of(checkpoint: Path, given: Path | None) -> Any:
    """The tokenizer that was given, or the checkpoint's own.

    Raises:
        DataError: There is none, or it cannot be loaded.
    """
    found = given or find_tokenizer(checkpoint)
    if found is None:
        raise DataError("the checkpoint has no tokenizer", got=checkpoint, legal=f"--tokenizer DIR, with {FILE}")
    return load_tokenizer(found)


def words_of(checkpoint: Path, tokenizer: Any | None) -> int:
    """Entries of the vocabulary that are words: what the model was converted from, or else its tokenizer, says."""
    step = layout.find(checkpoint).path
    rows = layout.architecture(step).vocab_size
    if folder := companions.beside(step):
        return min(rows, companions.read_config(folder).get("vocab_size", rows))
    return rows if tokenizer is None else min(rows, len(tokenizer))
