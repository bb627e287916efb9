"""Files and directories that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from megatron_ext.checkpoint import ranks
from megatron_ext.checkpoint.outputs import PARTIAL, check_writable, hold_new, release_new
from megatron_ext.errors import CheckpointError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place when the block ends well and is removed otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        flush(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def fresh_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory beside `path`, which becomes `path` when the block ends well and is removed otherwise.

    Raises:
        CheckpointError: `path` exists already and is not an empty directory, or cannot be created.
        ConfigError: Another job is making it.
    """
    path = Path(path)
    refuse_existing(path)
    try:
        hold_new(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
    except OSError as error:
        raise CheckpointError("the output cannot be created", got=f"{path}: {error.strerror}") from error
    try:
        yield temporary
        for file in (*temporary.rglob("*"), temporary):
            flush(file)
        temporary.chmod(0o777 & ~_umask())
        refuse_existing(path)
        temporary.rename(path)  # replaces an empty directory, and nothing else
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        release_new(path)
    flush(path.parent)


@contextmanager
def shared_directory(path: str | Path) -> Iterator[Path]:
    """`fresh_directory` of the first process, for all of them."""
    with ranks.all_or_none(), fresh_directory(path) if ranks.rank() == 0 else nullcontext() as own:
        yield Path(str(ranks.gather(own)[0]))


def publish(directory: Path, path: str | Path) -> None:
    """Give a directory in which everything is there the name `path`; it takes the place of an empty one.

    Raises:
        CheckpointError: `path` exists already and is not an empty directory.
    """
    path = Path(path)
    for file in (*directory.rglob("*"), directory):
        flush(file)
    refuse_existing(path)
    directory.rename(path)
    flush(path.parent)


def refuse_existing(path: Path) -> None:
    """Raise `CheckpointError` if there is anything at `path` that would be overwritten."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError("the output exists already and is not overwritten", got=path, legal="a new directory")


def flush(path: Path) -> None:
    """Let a file, or the names in a directory, be on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_new(path: Path, name: str = "--save") -> None:
    """Check that a directory can be made at `path`, before the work is done that is to go into it.

    Raises:
        CheckpointError: It exists already and is not empty.
        ConfigError: Nothing can be written there.
    """
    refuse_existing(path)
    check_writable(path, name)


def check_new_file(path: Path, name: str) -> None:
    """Check that a file can be made at `path`, before the work is done that is to go into it.

    Args:
        path: The file.
        name: The flag that says it.

    Raises:
        CheckpointError: There is something.
        ConfigError: Nothing can be written there.
    """
    if path.exists():
        raise CheckpointError(f"{name}: the file exists already and is not overwritten", got=path, legal="a new file")
    check_writable(path.parent, name)
