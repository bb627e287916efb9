"""Where a job may write, found out before it works for hours: the place can be written, and nobody else writes there.

A lock is one of POSIX (`fcntl`): the kernel gives it up when its process ends, however that is, and it holds between
machines on a shared file system that has locks (NFS; Lustre mounted with `flock`). Where there are none, the job goes
on without, and says so. The first process of a job holds it.
"""

import atexit
import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK = ".lock"
PARTIAL = ".partial"
"""What temporary files and directories end with; those of a job that was killed are removed by its next start."""

STARTING = 600.0
"""Seconds between the starts of a job's processes, at most: of such an age may be what another one is writing."""

_held: dict[Path, int] = {}


def check_writable(path: Path, name: str = "--save") -> None:
    """Check that something can be written into a directory that is there or is to be made; by writing.

    Raises:
        ConfigError: It cannot.
    """
    path = path.absolute()
    place = next(each for each in (path, *path.parents) if each.exists())
    if not place.is_dir():
        raise ConfigError(
            f"{name}: nothing can be written there: not a directory",
            got=place,
            legal="a directory, or one that is to be made",
        )
    try:
        handle, file = tempfile.mkstemp(prefix=".", suffix=PARTIAL, dir=place)
        try:
            os.write(handle, bytes(2**16))
            os.fsync(handle)
        finally:
            os.close(handle)
            Path(file).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{name}: nothing can be written there: {error.strerror}", got=path,
            legal="a directory that can be written, on a disk with room",
        ) from error  # fmt: skip


def contents(directory: Path) -> list[Path]:
    """What lies in a directory, without what jobs that work there keep in it for themselves."""
    names = {path: path.name for path in directory.iterdir()}
    locks = {path for path, name in names.items() if name.startswith(".") and name.endswith(LOCK)}
    return [path for path, name in names.items() if path not in locks and not name.endswith(PARTIAL)]


def hold_run(directory: Path, own: Sequence[str] = ()) -> None:
    """Let no other job write into a run directory as long as this process lives; clear what a killed one has left.

    Args:
        directory: Where.
        own: Names of files (`*` for anything) that only such a job writes, and not before this process is here; what
            is left of others is cleared once it is too old to be another job's work.

    Raises:
        ConfigError: Another job writes there.
    """
    _hold(directory / LOCK, directory)
    begun = time.time() - STARTING
    names = [f".????????{PARTIAL}", *(f".{name}.????????{PARTIAL}" for name in own)]  # the first are `check_writable`'s
    for path in directory.glob(f".*{PARTIAL}"):
        if any(fnmatchcase(path.name, name) for name in names) or path.lstat().st_mtime < begun:
            _clear([path])


def hold_new(path: Path, own: Sequence[str] = ()) -> None:
    """The same for a directory that is to appear whole; its lock and its beginnings lie beside it.

    Args:
        path: What is to appear.
        own: What the job keeps beside it meanwhile, as `.NAME.OWN`; a `*` is anything without a dot.

    Raises:
        ConfigError: Another job writes it.
    """
    lock = path.absolute().with_name(f".{path.name}{LOCK}")
    if lock not in _held:
        _hold(lock, path)
        name = re.escape(f".{path.name}.")
        beside = [rf"\.{name}{re.escape(each)}\.".replace(r"\*", "[^.]+") for each in own]
        left = re.compile(f"({'|'.join([name, *beside])})[^.]+{re.escape(PARTIAL)}")
        _clear(each for each in lock.parent.iterdir() if left.fullmatch(each.name))


def release_new(path: Path) -> None:
    """Give up what `hold_new` holds, once the directory is there, or is not to be."""
    _release(path.absolute().with_name(f".{path.name}{LOCK}"))


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Let no other job read and rewrite a file while this block does; waits until it is its turn."""
    lock = file.absolute().with_name(f".{file.name}{LOCK}")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s)", lock, error.strerror)
            break
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == lock.stat().st_ino:  # not one that its holder has just removed
                break
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _hold(lock: Path, what: Path) -> None:
    lock = lock.absolute()
    while lock not in _held:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            if not isinstance(error, BlockingIOError | PermissionError):
                logger.warning("%s: this file system has no locks (%s)", lock, error.strerror)
                return
            raise ConfigError(
                "another job writes there", got=f"{what}: {holder or 'a job that has just begun'}",
                legal="another directory, or wait until it ends",
            ) from error  # fmt: skip
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == lock.stat().st_ino:  # not one that its holder has just removed
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                _held[lock] = descriptor
                atexit.register(_release, lock)
                return
        os.close(descriptor)


def _release(lock: Path) -> None:
    descriptor = _held.pop(lock, None)
    if descriptor is not None:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _clear(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
