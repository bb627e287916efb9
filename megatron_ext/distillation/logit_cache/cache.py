"""A teacher's likeliest next tokens on disk, by sample, so that a student can learn without the teacher in memory.

A cache is a directory: `manifest.json`, which says what was stored (`manifest`), and the samples (`shards`).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.outputs import contents
from megatron_ext.distillation.logit_cache.manifest import MANIFEST, Manifest
from megatron_ext.distillation.logit_cache.shards import CacheReader
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.lm_head.objective import Objective


@dataclass(frozen=True)
class Cache:
    """A finished cache."""

    path: Path
    manifest: Manifest

    @classmethod
    def find(cls, path: str | Path) -> "Cache":
        """The cache at `path`.

        Raises:
            DataError: There is none, its writing was interrupted, or it is damaged or has lost samples.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        if manifest.sequences is None:
            raise DataError(
                "the writing of this cache was not finished", got=path,
                legal="run the same command with --distill-cache-write again: it goes on where it stopped",
            )  # fmt: skip
        if (held := len(CacheReader(path, manifest).known())) < manifest.sequences:
            gone = [name for name in manifest.shards or () if not (path / name).is_file()]
            raise DataError(
                "the cache has lost samples",
                got=f"{held:,} of {manifest.sequences:,} in {path}" + f"; without {', '.join(gone[:3])}" * bool(gone),
                legal="all shards; --distill-cache-write with this directory computes what is missing",
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
        if directory.exists() and not (directory.is_dir() and not contents(directory)):
            raise ConfigError("--distill-cache-write: this is no cache", got=directory, legal="a new directory")
        return manifest
    there = Manifest.read(directory)
    compared = [f.name for f in dataclasses.fields(Manifest) if f.compare]
    foreign = [key for key in compared if getattr(there, key) != getattr(manifest, key)]
    if foreign:
        taught = f" (it was --distill-teacher {there.provenance.get('teacher')})" if "teacher" in foreign else ""
        raise ConfigError(
            "--distill-cache-write: the cache was begun with other settings",
            got=", ".join(f"{key} {getattr(manifest, key)}" for key in foreign),
            legal=", ".join(f"{key} {getattr(there, key)}" for key in foreign) + f"{taught}, or a new directory",
        )
    return dataclasses.replace(there, sequences=None, shards=None)
