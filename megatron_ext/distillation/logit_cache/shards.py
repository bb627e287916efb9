"""The samples of a cache: shards in safetensors, each of n whole samples of s tokens with k entries.

`sample_id` (n, 2) of 128 bits, `index` (n, s, k), the likeliest first, in two bytes where the vocabulary fits and four
otherwise, `log_q` (n, s, k), `log_rest` (n, s) in fp32, and `checksum` (n,), XXH3 with 64 bits over a sample's part of
all of these. A sample is found by its identity alone. A shard is called by the checksum of its identities and
checksums, so that no two processes write different things under one name.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from megatron_ext.checkpoint.atomic import atomic_write
from megatron_ext.data.sample_id import to_hex
from megatron_ext.distillation.logit_cache.manifest import MANIFEST, Manifest
from megatron_ext.errors import DataError
from megatron_ext.lm_head.divergences import TopK

SHARD_BYTES = 2**28
COLUMNS = ("sample_id", "index", "log_q", "log_rest")
TYPES = {"int64": "I64", "int32": "I32", "uint16": "U16", "float16": "F16", "float32": "F32"}
"""What safetensors calls them."""
ROUNDING = 1e-3
"""By which the stored logarithm of a probability may lie above 0."""


class CacheWriter:
    """Adds samples to a cache, each once, a shard at a time; on leaving it stores what it has, whatever happened.

    Several processes may write into one directory.

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
        self.known = set(known or ())
        """Identities of what is stored, or will be on leaving."""
        self._samples: list[dict[str, Any]] = []
        self._per_shard = max(1, shard_bytes // (manifest.bytes_per_token * manifest.sequence_length))

    def add(self, sample_id: Int[Tensor, "b 2"], kept: TopK) -> None:
        """Add the samples of a micro-batch that are not there yet.

        Args:
            sample_id: Their identities.
            kept: The entries of their tokens, in the order (s, b), the likeliest first.

        Raises:
            DataError: The disk takes no more; what was stored before stays.
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
            if (key := identity.tobytes()) not in self.known:
                self.known.add(key)
                sample = {column: np.ascontiguousarray(values[i]) for column, values in columns.items()}
                self._samples.append({**sample, "checksum": np.uint64(_checksum(sample))})
        while len(self._samples) >= self._per_shard:
            some, self._samples = self._samples[: self._per_shard], self._samples[self._per_shard :]
            self._store(some)

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        some, self._samples = self._samples, []
        if some:
            self._store(some)

    def _store(self, samples: list[dict[str, Any]]) -> None:
        columns = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
        content = _content(columns["sample_id"], columns["checksum"])
        about = {"settings": self._manifest.settings, "content": content}
        try:
            with atomic_write(self._directory / f"{content}.safetensors") as temporary:
                save_file(columns, temporary, metadata=about)
        except (OSError, SafetensorError) as problem:
            reason = getattr(problem, "strerror", None) or str(problem)
            raise DataError(
                f"a shard of the cache cannot be written: {reason}", got=self._directory,
                legal="room for it; the same command goes on from what is stored",
            ) from problem  # fmt: skip


class CacheReader:
    """Finds samples in a cache. Shards are mapped into memory, so what is read of them is what is asked for.

    Args:
        directory: The cache.
        manifest: What it holds.

    Raises:
        DataError: A shard is damaged, or of another cache.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._shards = [Shard(path, manifest) for path in sorted(directory.glob("*.safetensors"))]
        parts = [shard.sample_id for shard in self._shards]
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
            DataError: A sample is missing, or damaged.
        """
        found = [self._find(identity) for identity in sample_id.cpu().numpy()]
        if None in found:
            missing = found.index(None)
            begins = f", which begins with {labels[missing, :8].tolist()}" if labels is not None else ""
            raise DataError(
                f"a sample is not in the cache: {to_hex(sample_id[missing])}{begins}", got=self._directory,
                legal="the data, --split, tokenizer and --seq-length that it was written with; or add these data to "
                "it: --distill-cache-write with this directory and the same settings",
            )  # fmt: skip
        at, device = positions.cpu().numpy(), sample_id.device
        samples = [self._shards[place[0]].read(place[1]) for place in found if place]
        index, log_q, log_rest = (
            torch.from_numpy(np.stack([sample[key][at] for sample in samples], axis=1))
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


class Shard:
    """One file of a cache, whose samples are checked as they are read; opening it checks all but these.

    Attributes:
        sample_id: Identities of its samples.

    Args:
        path: The file.
        manifest: What the cache holds.

    Raises:
        DataError: It is damaged, or of another cache.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest
        s, k = manifest.sequence_length, manifest.k
        try:
            self._file: Any = safe_open(path, framework="np")
            about = self._file.metadata() or {}
            self.sample_id: np.ndarray = self._file.get_tensor("sample_id")
            self._checksums: np.ndarray = self._file.get_tensor("checksum")
            columns = [self._file.get_slice(key) for key in COLUMNS]
        except (SafetensorError, OSError) as error:
            raise self._damage(str(error)) from error
        if about.get("content") != _content(self.sample_id, self._checksums):
            raise self._damage("its checksum is that of other content")
        n, types = len(self.sample_id), ["int64", np.dtype(manifest.index_dtype).name, manifest.dtype, "float32"]
        form = [(TYPES[name], shape) for name, shape in zip(types, [[n, 2], [n, s, k], [n, s, k], [n, s]], strict=True)]
        found = [(column.get_dtype(), column.get_shape()) for column in columns]
        if found != form or about.get("settings") != manifest.settings:
            raise DataError(
                f"a shard is of another cache than {MANIFEST}", got=path,
                legal="shards that one --distill-cache-write, or several with the same settings, have written",
            )  # fmt: skip

    def read(self, row: int) -> dict[str, np.ndarray]:
        """The columns of a sample.

        Raises:
            DataError: It is damaged.
        """
        try:
            sample = {key: np.ascontiguousarray(self._file.get_slice(key)[row]) for key in COLUMNS}
        except (SafetensorError, OSError) as error:
            raise self._damage(str(error)) from error
        if _checksum(sample) != self._checksums[row]:
            raise self._damage("its checksum is that of other content")
        index, log_q, log_rest = (sample[key] for key in COLUMNS[1:])
        if index.max() >= self._manifest.vocabulary or index.min() < 0:
            raise self._damage(f"token {index.max()} in a vocabulary of {self._manifest.vocabulary}")
        if not np.isfinite(log_q).all() or log_q.max() > ROUNDING or not (log_rest <= ROUNDING).all():
            raise self._damage("its values are no logarithms of probabilities")
        return sample

    def _damage(self, why: str) -> DataError:
        return DataError(
            f"a shard of the cache is damaged ({why})", got=self._path,
            legal="delete it and write the cache again: only its samples are computed again",
        )  # fmt: skip


def _checksum(sample: dict[str, np.ndarray]) -> int:
    """Of one sample; its columns must be contiguous."""
    hasher = xxhash.xxh3_64()
    for key in COLUMNS:
        hasher.update(sample[key])
    return hasher.intdigest()


def _content(sample_id: np.ndarray, checksum: np.ndarray) -> str:
    """Of a shard: with the samples' own checksums it is one of everything; 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(sample_id).tobytes() + checksum.tobytes())
