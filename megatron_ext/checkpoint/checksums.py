"""Checksums of the weights on disk, which are compared when they are read: `checksums.json`, written last.

It says of each part of a file, such as a tensor's, where it lies and its XXH3 with 64 bits, faster than a disk is.
Where it is missing, as beside files of others, the CRC-32 that `torch.save` has put beside each value is compared.
"""

import io
import json
import os
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_ext.checkpoint import layout, ranks
from megatron_ext.checkpoint.atomic import atomic_write, flush
from megatron_ext.errors import CheckpointError
from megatron_ext.untrusted.paths import inside

FILE = "checksums.json"
ALGORITHM = "xxh3_64"
BLOCK = 2**20  # bytes
WHOLE = (".metadata", "metadata.json", "common.pt")
"""Files of a step that are one part."""

Parts = dict[int, tuple[int, str]]
"""Of one file: by the first byte of each part its length and its checksum, 16 hex digits."""


def checksum(path: Path, offset: int, length: int) -> str:
    """The checksum of a part of a file.

    Raises:
        EOFError: The file ends before it.
    """
    hasher, buffer = xxhash.xxh3_64(), memoryview(bytearray(min(BLOCK, max(1, length))))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while length:
            done = file.readinto(buffer[: min(length, len(buffer))])
            if not done:
                raise EOFError("the file ends too early")
            hasher.update(buffer[:done])
            length -= done
    return hasher.hexdigest()


@dataclass(frozen=True)
class Checksums:
    """Those of the files in a directory."""

    directory: Path
    files: dict[str, Parts]

    @classmethod
    def read(cls, directory: Path) -> "Checksums | None":
        """What a directory says of its files; None if it says nothing.

        Raises:
            CheckpointError: It is damaged.
        """
        path = inside(directory, FILE)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["algorithm"] != ALGORITHM or content.pop("checksum") != _hash(content):
                raise ValueError("its own checksum is that of other content")
            files = {
                str(name): {int(first): (int(length), str(written)) for first, length, written in parts}
                for name, parts in content["files"].items()
            }
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the checksums cannot be read ({error})", got=path, legal="without this file, nothing is compared"
            ) from error
        return cls(directory, files)

    def write(self) -> None:
        """Put them into the directory, atomically."""
        files = {name: [[first, *part] for first, part in sorted(parts.items())] for name, parts in self.files.items()}
        content: dict[str, Any] = {"algorithm": ALGORITHM, "files": files}
        with atomic_write(self.directory / FILE) as temporary:
            temporary.write_text(json.dumps(content | {"checksum": _hash(content)}) + "\n", encoding="utf-8")

    def check(self, name: str, offset: int = 0) -> str:
        """Compare one part of a file, and give its checksum.

        Raises:
            CheckpointError: It is damaged, or of another save.
        """
        path = inside(self.directory, name)
        length, _ = self._written(name, offset)
        try:
            found = checksum(path, offset, length)
        except (OSError, EOFError):
            found = ""
        return self.compare(name, offset, found)

    def compare(self, name: str, offset: int, found: str) -> str:
        """Compare the checksum of a part of a file that was read, and give it; see `check`."""
        length, written = self._written(name, offset)
        if written is None or found != written:
            raise CheckpointError(
                f"the checkpoint is damaged: {name} is not what was written",
                got=f"bytes {offset:,} to {offset + length:,} of {inside(self.directory, name)}",
                legal="a copy of that file, or an older step by its own path (--ckpt-step in training); if it was "
                f"changed on purpose, delete {FILE}",
            )
        return written

    def _written(self, name: str, offset: int) -> tuple[int, str | None]:
        return self.files.get(name, {}).get(offset, (0, None))


def forget(step: Path) -> None:
    """Remove what says that an earlier save into the same directory is complete, before any rank writes it anew.

    A collective. Else whoever reads it after a kill would look for tensors where those of the earlier one lay.
    """
    if ranks.rank() == 0:
        for name in (FILE, "metadata.json", ".metadata"):
            (step / name).unlink(missing_ok=True)
    ranks.gather(None)


def write_step(step: Path) -> None:
    """Write the checksums of a step that has just been saved; each rank reads the files that it has written.

    A collective. The disk's cache has them still, so that it costs what a copy in memory does.

    Raises:
        CheckpointError: A file cannot be read back.
    """
    own: dict[str, Parts] = {}
    problem = None
    try:
        for name, parts in _parts(step, lambda key: True).items():
            if _writer(name) == ranks.rank():
                own[name] = {first: (length, checksum(step / name, first, length)) for first, length in parts.items()}
    except (OSError, EOFError, CheckpointError) as error:
        problem = f"{error}"
    gathered = ranks.gather((own, problem))
    for _, failure in gathered:
        if failure is not None:
            raise CheckpointError(f"what was just saved cannot be read back: {failure}", got=step)
    if ranks.rank() == 0:
        for file in (*(step / name for name in WHOLE if (step / name).is_file()), step):
            flush(file)  # Megatron removes an older step next, where it is told to keep few
        Checksums(step, {name: parts for files, _ in gathered for name, parts in files.items()}).write()
        flush(step.parent)


def verify_step(step: Path, *, weights_only: bool = False, share: tuple[int, int] | None = None) -> bool:
    """Compare what a step holds with its checksums, or else with torch's.

    Args:
        step: The step.
        weights_only: Leave the optimizer's state out.
        share: The number of this process and how many do this together, each its share; torchrun's by default.

    Returns:
        Whether it has checksums of ours.

    Raises:
        CheckpointError: Something is damaged; names the file.
    """
    sums = Checksums.read(step)
    rank, size = share or (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    parts = _parts(step, lambda key: not (weights_only and key.startswith("optimizer")))
    pieces = sorted((-length, name, first) for name, own in parts.items() for first, length in own.items())
    for length, name, first in pieces[rank::size]:
        if sums is not None:
            sums.check(name, first)
        elif name not in WHOLE:
            _check_crc(inside(step, name), first, -length)
    return sums is not None


def verify_start(step: layout.Step, args: Namespace, continues: bool) -> None:
    """`verify_step` of what a command line loads, each rank its share, before anything is started.

    Raises:
        CheckpointError: Something that it loads is damaged.
    """
    if not args.dry_run:
        verify_step(step.path, weights_only=not continues or args.finetune or args.no_load_optim)


def _parts(step: Path, wanted: Callable[[str], bool]) -> dict[str, dict[int, int]]:
    """By file and first byte the lengths of the parts of a step."""
    files = {name: {0: (step / name).stat().st_size} for name in WHOLE if (step / name).is_file()}
    for index, info in layout.read_metadata(step).storage_data.items():
        if wanted(index.fqn):
            files.setdefault(info.relative_path, {})[info.offset] = info.length
    return files


def _check_crc(path: Path, offset: int, length: int) -> None:
    """Compare the values in what `torch.save` has put into a part of a file; it may have left the CRC-32 out."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            if file.read(2) != b"PK":
                return  # no zip file, and so not from torch.save
            with zipfile.ZipFile(_Part(file, offset, length)) as records:
                for record in records.infolist():
                    if record.CRC:
                        with records.open(record) as values:
                            while values.read(BLOCK):
                                pass
    except Exception as error:  # zipfile raises nearly anything on damaged bytes
        raise CheckpointError(
            f"the checkpoint is damaged: {path.name} is not what was written ({error})",
            got=f"bytes {offset:,} to {offset + length:,} of {path}", legal="a copy of that file, or an older step",
        ) from error  # fmt: skip


class _Part(io.RawIOBase):
    """A part of a file as a file, to be read."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence])
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._offset + self._place)
        done = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._place)]) or 0
        self._place += done
        return done


def _writer(name: str) -> int:
    """The rank that has written a file: `__3_0.distcp` is the fourth's."""
    words = name.split("_")
    number = words[2] if len(words) > 3 and name.startswith("__") else "0"
    return int(number) % ranks.count() if number.isdigit() else 0


def _hash(content: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def whole(directory: Path, names: Iterable[str]) -> dict[str, Parts]:
    """Files that are one part."""
    sizes = {name: (directory / name).stat().st_size for name in names if (directory / name).is_file()}
    return {name: {0: (size, checksum(directory / name, 0, size))} for name, size in sizes.items()}
