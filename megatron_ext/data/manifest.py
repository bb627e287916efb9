"""What `megatron-ext data` notes beside a dataset, and whether the dataset and a run agree with it.

Datasets without a manifest, made elsewhere, are taken as they are.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.file_checksums import check_file
from megatron_ext.checkpoint.tokenizer import fingerprint
from megatron_ext.data.index import Index
from megatron_ext.errors import DataError

MANIFEST = "manifest.json"
NAME = "text_document"
CHECKED_BYTES = 64 << 20  # of a `.bin` whose checksum is looked at whenever it is used: a fraction of a second


def read(prefix: str) -> dict[str, Any] | None:
    """The manifest of the dataset `prefix`; None if it has none of ours.

    Raises:
        DataError: It is damaged.
    """
    path = Path(prefix).parent / MANIFEST
    if Path(prefix).name != NAME or not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            "the manifest of the data is damaged", got=f"{path}: {error}",
            legal="a copy of that file, or the data made anew; without it, nothing is compared",
        ) from error  # fmt: skip
    return content if isinstance(content, dict) and {"vocab_size", "bin_sha256"} <= content.keys() else None


def check(prefix: str, tokenizer: str | None, rows: int) -> None:
    """Check that a run can read the dataset `prefix`.

    Args:
        prefix: Its path without `.bin` and `.idx`.
        tokenizer: The fingerprint of the run's tokenizer, if it can be told.
        rows: Of the model's embedding.

    Raises:
        DataError: It was made with another tokenizer, has tokens that the model does not, or is not what was written.
        CheckpointError: A file beside it is not what was written.
    """
    for file in (Path(prefix).parent / MANIFEST, Path(f"{prefix}.idx")):
        if file.is_file() and file.stat().st_size <= CHECKED_BYTES:
            check_file(file)
    manifest = read(prefix)
    if manifest is None:
        return
    if manifest["vocab_size"] > rows:
        raise DataError(
            "the data have more tokens than the model", got=f"{prefix}: {manifest['vocab_size']:,} tokens",
            legal=f"{rows:,} at most, the rows of the model's vocabulary",
        )  # fmt: skip
    beside = Path(prefix).parent / "tokenizer"
    own = manifest.get("tokenizer_fingerprint") or fingerprint(beside)
    if None not in (own, tokenizer) and own != tokenizer:
        raise DataError(
            "the data were made with another tokenizer than the run's: the same numbers mean other tokens", got=prefix,
            legal=f"--tokenizer-model {beside}, or data made with the run's (`megatron-ext data --tokenizer DIR`)",
        )  # fmt: skip
    if Path(f"{prefix}.bin").stat().st_size <= CHECKED_BYTES:
        _check_content(prefix, manifest)


def verify(directory: Path) -> dict[str, Any]:
    """The manifest of a dataset that has been read from its first byte to its last.

    Args:
        directory: What `megatron-ext data --out` wrote.

    Raises:
        DataError: There is no manifest, or the dataset is not what was written.
    """
    prefix = str(directory / NAME)
    manifest = read(prefix)
    if manifest is None:
        raise DataError("no dataset of `megatron-ext data`", got=directory, legal=f"a directory with {MANIFEST}")
    Index.read(prefix).check_bin()
    _check_content(prefix, manifest)
    return manifest


def _check_content(prefix: str, manifest: dict[str, Any]) -> None:
    with open(f"{prefix}.bin", "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != manifest["bin_sha256"]:
        raise DataError(
            "the data are not what `megatron-ext data` wrote", got=f"{prefix}.bin: SHA-256 {found}",
            legal=f"{manifest['bin_sha256']}, as {MANIFEST} says: make the data anew",
        )  # fmt: skip
