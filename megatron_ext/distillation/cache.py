"""A teacher's likeliest next tokens on disk, by sample, so that a student can learn without the teacher in memory.

A cache is a directory: `manifest.json`, which says what was stored, and shards in safetensors, each of n whole samples
of s tokens: `sample_id` (n, 2) of 128 bits, `index` (n, s, k), the likeliest first, in two bytes where the vocabulary
fits and four otherwise, `log_q` (n, s, k), and `log_rest` (n, s) in fp32. A sample is found by its identity alone.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from megatron_ext.checkpoint.atomic import replacing
from megatron_ext.distillation.divergences import TopK
from megatron_ext.distillation.identity import name
from megatron_ext.distillation.objective import Objective
from megatron_ext.errors import ConfigError, DataError

MANIFEST = "manifest.json"
FORMAT = 1
SHARD_BYTES = 2**28
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
        provenance: Where it all came from, for people.
        sequences: Samples in the cache; None while it is being written.
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
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)
    sequences: int | None = field(default=None, compare=False)

    @property
    def index_dtype(self) -> Any:
        """The smallest type that numbers the vocabulary."""
        return np.uint16 if self.vocabulary <= 2**16 else np.int32

    @property
    def bytes_per_token(self) -> int:
        """On disk."""
        return self.k * (np.dtype(self.index_dtype).itemsize + np.dtype(self.dtype).itemsize) + 4

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
                raise DataError("the cache is in another format", got=version, legal=FORMAT)
            return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"the cache's manifest is damaged ({error!r})", got=path) from error

    def write(self, directory: Path) -> None:
        """Put it into the directory, atomically."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        with replacing(directory / MANIFEST) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Cache:
    """A finished cache."""

    path: Path
    manifest: Manifest

    @classmethod
    def find(cls, path: str | Path) -> "Cache":
        """The cache at `path`.

        Raises:
            DataError: There is none, or its writing was interrupted.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        if manifest.sequences is None:
            raise DataError(
                "the writing of this cache was not finished", got=path,
                legal="run the same command with --distill-cache-write again: it goes on where it stopped",
            )  # fmt: skip
        return cls(path, manifest)

    def check(self, objective: Objective, **data: Any) -> None:
        """Check that it holds what a job asks for.

        Args:
            objective: `top-k`, `top-k-rest`, or `forward-kl` where it holds the whole vocabulary; its temperature, and
                at most as many entries as it holds.
            **data: Other fields of the manifest that must be so.

        Raises:
            ConfigError: It does not.
        """
        own = self.manifest
        possible = ["top-k-rest", "top-k"] + ["forward-kl"] * (own.k == own.vocabulary)
        if objective.divergence not in possible:
            raise ConfigError(
                f"--distill-loss: the cache has {own.k:,} of {own.vocabulary:,} entries", got=objective.divergence,
                legal=", ".join(possible),
            )  # fmt: skip
        if objective.k > own.k:
            raise ConfigError("--distill-top-k: the cache has fewer entries", got=objective.k, legal=f"1 to {own.k:,}")
        if objective.temperature != own.temperature:
            raise ConfigError(
                "--distill-temperature: the cache is of another", got=objective.temperature, legal=own.temperature
            )
        for key, value in data.items():
            if (stored := getattr(own, key)) != value:
                raise ConfigError(f"the cache's {key.replace('_', ' ')} is not this job's", got=value, legal=stored)


def begin(directory: Path, manifest: Manifest) -> Manifest:
    """What is to be written into `directory`: `manifest`, or that of the cache which is there and is gone on with.

    Nothing is written yet.

    Raises:
        ConfigError: There is something else, or a cache with other settings.
        DataError: Its manifest is damaged.
    """
    if not (directory / MANIFEST).is_file():
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise ConfigError("--distill-cache-write: this is no cache", got=directory, legal="a new directory")
        return manifest
    there = Manifest.read(directory)
    compared = [f.name for f in dataclasses.fields(Manifest) if f.compare]
    foreign = [key for key in compared if getattr(there, key) != getattr(manifest, key)]
    if foreign:
        raise ConfigError(
            "--distill-cache-write: the cache was begun with other settings",
            got=", ".join(f"{key} {getattr(manifest, key)}" for key in foreign),
            legal=", ".join(f"{key} {getattr(there, key)}" for key in foreign) + ", or a new directory",
        )
    return dataclasses.replace(there, sequences=None)


class Writer:
    """Adds samples to a cache, each once, a shard at a time; on leaving it stores what it has, whatever happened.

    Several processes may write into one directory if their samples differ.

    Args:
        directory: The cache; its manifest is not touched.
        manifest: What is stored.
        known: Identities that need not be stored again.
        shard_bytes: Size of a shard, at most, unless one sample is larger.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, known: set[bytes] | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._directory, self._manifest = directory, manifest
        self._known = set(known or ())
        self._samples: list[dict[str, np.ndarray]] = []
        self._per_shard = max(1, shard_bytes // (manifest.bytes_per_token * manifest.sequence_length))

    def add(self, sample_id: Int[Tensor, "b 2"], kept: TopK) -> None:
        """Add the samples of a micro-batch that are not there yet.

        Args:
            sample_id: Their identities.
            kept: The entries of their tokens, in the order (s, b), the likeliest first.
        """
        own, shape = self._manifest, (self._manifest.sequence_length, len(sample_id))
        lowest = np.finfo(own.dtype).min  # a probability may have vanished, but no logarithm is infinite
        columns = {
            "sample_id": sample_id.cpu().numpy(),
            "index": kept.index.view(*shape, -1).transpose(0, 1).cpu().numpy().astype(own.index_dtype),
            "log_q": kept.log_q.view(*shape, -1).transpose(0, 1).cpu().numpy().clip(lowest).astype(own.dtype),
            "log_rest": kept.log_rest.view(*shape).T.cpu().numpy().astype(np.float32),
        }
        for i, identity in enumerate(columns["sample_id"]):
            if (key := identity.tobytes()) not in self._known:
                self._known.add(key)
                self._samples.append({column: values[i] for column, values in columns.items()})
        while len(self._samples) >= self._per_shard:
            self._store(self._samples[: self._per_shard])
            del self._samples[: self._per_shard]

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._samples:
            self._store(self._samples)
            self._samples = []

    def _store(self, samples: list[dict[str, np.ndarray]]) -> None:
        path = self._directory / f"{samples[0]['sample_id'].tobytes().hex()}.safetensors"  # no two have one sample
        columns = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
        with replacing(path) as temporary:  # safetensors takes the memory as it lies
            save_file({key: np.ascontiguousarray(values) for key, values in columns.items()}, temporary)


class Reader:
    """Finds samples in a cache. Shards are mapped into memory, so what is read of them is what is asked for.

    Raises:
        DataError: A shard is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._shards = [_open(path) for path in sorted(directory.glob("*.safetensors"))]
        parts = [shard.get_tensor("sample_id") for shard in self._shards]
        ids = np.concatenate(parts) if parts else np.empty((0, 2), np.int64)
        shard = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        row = np.concatenate([np.arange(len(part)) for part in parts]) if parts else np.empty(0, np.int64)
        order = np.argsort(ids[:, 0], kind="stable")
        self._ids, self._places = ids[order], np.stack([shard, row], axis=1)[order]

    def known(self) -> set[bytes]:
        """The identities of all samples."""
        return {identity.tobytes() for identity in self._ids}

    def read(
        self,
        sample_id: Int[Tensor, "b 2"],
        positions: Int[Tensor, " s"],
        k: int,
        labels: Int[Tensor, "b s"] | None = None,
    ) -> TopK:
        """The entries of some samples' tokens, in the order (s, b), on the device of `sample_id`.

        Args:
            sample_id: Which samples.
            positions: Which of their tokens.
            k: How many entries of each; the others join the rest.
            labels: How the samples go on, to be shown if one is missing.

        Raises:
            DataError: A sample is missing.
        """
        found = [self._find(identity) for identity in sample_id.cpu().numpy()]
        if None in found:
            missing = found.index(None)
            begins = f", which begins with {labels[missing, :8].tolist()}" if labels is not None else ""
            raise DataError(
                f"a sample is not in the cache: {name(sample_id[missing])}{begins}", got=self._directory,
                legal="the data, --split, tokenizer and --seq-length that it was written with; or add these data to "
                "it: --distill-cache-write with this directory and the same settings",
            )  # fmt: skip
        at, device = positions.cpu().numpy(), sample_id.device
        index, log_q, log_rest = (
            torch.from_numpy(np.stack([self._row(place, key)[at] for place in found if place], axis=1))
            for key in ("index", "log_q", "log_rest")
        )
        log_q, log_rest = log_q.to(device).float(), log_rest.to(device)
        log_rest = torch.logaddexp(log_rest, log_q[..., k:].logsumexp(-1))
        log_q = log_q[..., :k]
        # The rounding of many entries adds up: a sum of one again.
        log_sum = torch.logaddexp(log_q.logsumexp(-1), log_rest)
        index = index.to(torch.int32).to(device)[..., :k].long()
        return TopK(
            index.flatten(0, 1), (log_q - log_sum.unsqueeze(-1)).flatten(0, 1), (log_rest - log_sum).flatten(0, 1)
        )

    def _find(self, identity: np.ndarray) -> tuple[int, int] | None:
        at = int(np.searchsorted(self._ids[:, 0], identity[0]))
        while at < len(self._ids) and self._ids[at, 0] == identity[0]:
            if self._ids[at, 1] == identity[1]:
                return int(self._places[at, 0]), int(self._places[at, 1])
            at += 1
        return None

    def _row(self, place: tuple[int, int], key: str) -> np.ndarray:
        shard, row = place
        return self._shards[shard].get_slice(key)[row]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise DataError(
            f"a shard of the cache is damaged ({error})", got=path,
            legal="delete it and write the cache again: only its samples are computed again",
        ) from error  # fmt: skip
