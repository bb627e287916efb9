"""What a cache of a teacher says of itself: `manifest.json`, which a changed character makes unreadable."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_ext.checkpoint.atomic import atomic_write
from megatron_ext.errors import DataError

MANIFEST = "manifest.json"
FORMAT = 2
CHECKSUM = "checksum"
DTYPES = ("float16", "float32")
"""Of the logarithms of the probabilities. bfloat16 takes the same room as float16 and is eight times as coarse."""


@dataclass(frozen=True)
class Manifest:
    """What a cache holds. Fields that are compared must be the same whenever anything is added to it.

    Attributes:
        k: Entries per token, next to the rest.
        dtype: Of the logarithms of their probabilities: one of `DTYPES`.
        temperature: Of the distribution.
        sequence_length: Tokens of a sample.
        vocabulary: Its entries, without padding.
        teacher: Fingerprint of its checkpoint.
        precision: In which the teacher computed.
        reset_at_documents: Whether positions, and whether attention, begin anew with each document.
        seed: How documents were packed into samples. Whoever goes on or reads takes it from here.
        tokenizer: Fingerprint of the tokenizer (`checkpoint.tokenizer`); None if it is not known.
        provenance: Where it all came from, for people.
        sequences: Samples in the cache; None while it is being written.
        shards: The files that hold them; None while it is being written, or by an older version.
    """

    k: int
    dtype: str
    temperature: float
    sequence_length: int
    vocabulary: int
    teacher: str
    precision: str
    reset_at_documents: list[bool]
    seed: int = field(compare=False)
    tokenizer: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)
    sequences: int | None = field(default=None, compare=False)
    shards: list[str] | None = field(default=None, compare=False)

    @property
    def index_dtype(self) -> Any:
        """The smallest type that numbers the vocabulary."""
        return np.uint16 if self.vocabulary <= 2**16 else np.int32

    @property
    def bytes_per_token(self) -> int:
        """On disk."""
        return self.k * (np.dtype(self.index_dtype).itemsize + np.dtype(self.dtype).itemsize) + 4

    @property
    def settings(self) -> str:
        """A hash of what must be the same in all of a cache, which each of its shards names; 16 hex digits."""
        names = [f.name for f in dataclasses.fields(self) if f.compare]
        return _hash({name: getattr(self, name) for name in (*names, "seed")})

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """The manifest of a cache.

        Raises:
            DataError: There is none, or it is damaged.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise DataError(
                f"no cache of a teacher: {MANIFEST} is missing", got=directory,
                legal="a directory written by --distill-cache-write",
            )  # fmt: skip
        try:
            content = json.loads(path.read_text())
            if (version := content.pop("format")) != FORMAT:
                raise DataError("the cache is in another format", got=version, legal=f"{FORMAT}: write it again")
            if content.pop(CHECKSUM) != _hash(content):
                raise ValueError("its checksum is that of other content")
            return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"the cache's manifest is damaged ({error!r})", got=path,
                legal="the file as --distill-cache-write wrote it; or write the cache again, to a new directory",
            ) from error  # fmt: skip

    def write(self, directory: Path) -> None:
        """Put it into the directory, atomically."""
        own = dataclasses.asdict(self)
        content = {"format": FORMAT, **own, CHECKSUM: _hash(own)}
        with atomic_write(directory / MANIFEST) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")


def _hash(content: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
