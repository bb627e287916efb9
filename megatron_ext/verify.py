"""`megatron-ext verify`: whether what lies in a directory is what was written there, all of it."""

import argparse
from pathlib import Path

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.checksums import Checksums, verify_step
from megatron_ext.data import manifest as dataset
from megatron_ext.distillation.logit_cache.manifest import MANIFEST, Manifest
from megatron_ext.errors import CheckpointError, DataError, MegatronExtError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="of checkpoints, one step, an exported model, a teacher's cache, or a data set",
    )


def main(args: argparse.Namespace) -> None:
    """Compare every checksum there is, and name what is damaged.

    Raises:
        DataError: Something is damaged, or nothing there has checksums.
    """
    directory: Path = args.directory
    damaged = []
    for path, check in _artefacts(directory):
        try:
            print(f"{path}: {check(path)}", flush=True)
        except MegatronExtError as error:
            damaged.append(path)
            print(f"{path}: {error}", flush=True)
    if damaged:
        raise DataError("damaged", got=", ".join(map(str, damaged)))


def _artefacts(directory: Path):
    """What is to be checked, each with the function that does it and says what it has compared."""
    if not directory.is_dir():
        raise DataError("no such directory", got=directory)
    if (directory / ".metadata").is_file():
        return [(directory, _step)]
    beside = [] if Checksums.read(directory) is None else [(directory, _files)]
    if steps := layout.steps(directory):
        return [*((step.path, _step) for step in steps), *beside]
    if (directory / f"{dataset.NAME}.idx").is_file():
        return [*beside, (directory, _dataset)]
    if beside:
        return beside
    if (directory / MANIFEST).is_file():
        return [*((path, _shard) for path in sorted(directory.glob("*.safetensors"))), (directory, _cache)]
    raise DataError(
        "nothing that can be verified", got=directory,
        legal="checkpoints, what `megatron-ext convert` or `data` wrote, or a cache of --distill-cache-write, with its "
        f"{MANIFEST}",
    )  # fmt: skip


def _step(path: Path) -> str:
    layout.verify(path)
    own = verify_step(path, share=(0, 1))
    return "all checksums are right" if own else "no checksums of ours; those of torch, where it made any, are right"


def _files(path: Path) -> str:
    sums = Checksums.read(path)
    if sums is None:
        raise CheckpointError("the checksums are gone", got=path)
    for name, parts in sums.files.items():
        for first in parts:
            sums.check(name, first)
    return f"all checksums of {len(sums.files)} files are right"


def _shard(path: Path) -> str:
    from megatron_ext.distillation.logit_cache.shards import Shard

    shard = Shard(path, Manifest.read(path.parent))
    for row in range(len(shard.sample_id)):
        shard.read(row)
    return f"all checksums of {len(shard.sample_id):,} sequences are right"


def _cache(path: Path) -> str:
    from megatron_ext.distillation.logit_cache.cache import Cache

    return f"whole, {Cache.find(path).manifest.sequences:,} sequences"


def _dataset(path: Path) -> str:
    return f"{dataset.verify(path)['tokens']:,} tokens, as they were written"
