"""Checksums of files that are read as a whole, such as plans, scores, tokenizers and configurations.

They stand in the `checksums.json` of the directory that a job has written. Who reads such a file compares it first; a
file that none speaks of, or a directory of others, is taken as it is.
"""

from collections.abc import Iterable
from pathlib import Path

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.checksums import FILE, Checksums, whole
from megatron_ext.errors import CheckpointError, UntrustedError


def write_rest(directory: Path, but: Iterable[str] = ()) -> None:
    """Write the checksums of all files of a directory that have none there yet, but of those in its steps.

    Args:
        directory: A run directory, or an exported model.
        but: Files to be edited.
    """
    known = Checksums.read(directory)
    files = known.files if known is not None else {}
    apart = {step.path.name for step in layout.steps(directory)} | {FILE, layout.TRACKER, *but}
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
    rest = [name for name in names if Path(name).parts[0] not in apart and name not in files]
    Checksums(directory, files | whole(directory, rest)).write()


def add(directory: Path, folder: str) -> None:
    """Write the checksums of the files in a folder of a directory, beside those that it has."""
    known = Checksums.read(directory)
    others = {} if known is None else {n: p for n, p in known.files.items() if Path(n).parts[0] != folder}
    names = [f"{folder}/{path.name}" for path in sorted((directory / folder).iterdir()) if path.is_file()]
    Checksums(directory, others | whole(directory, names)).write()


def check_file(path: str | Path) -> None:
    """Compare a file with what the directory it lies in, or that directory's own, says of it.

    Raises:
        CheckpointError: It is not what was written, or gone.
    """
    path = Path(path).absolute()
    for directory in path.parents[:2]:
        if (sums := Checksums.read(directory)) is not None:
            _check(sums, [str(path.relative_to(directory))])


def check_folder(directory: Path, folder: str) -> None:
    """The same for all files in a folder of a directory."""
    if (sums := Checksums.read(directory)) is not None:
        _check(sums, (name for name in sums.files if Path(name).parts[0] == folder))


def check_all(directory: Path, but: Iterable[str] = ()) -> None:
    """The same for all files of a directory, but for those with these endings."""
    if (sums := Checksums.read(directory)) is not None:
        _check(sums, (name for name in sums.files if not name.endswith(tuple(but))))


def _check(sums: Checksums, names: Iterable[str]) -> None:
    for name in names:
        for offset in sums.files.get(name, {}):
            try:
                sums.check(name, offset)
            except UntrustedError:
                raise
            except CheckpointError as error:
                what = "not what was written" if (sums.directory / name).exists() else "missing"
                raise CheckpointError(
                    f"damaged: {name} is {what}", got=sums.directory / name,
                    legal=f"a copy of that file; if it was changed on purpose, remove it from {FILE}, or that file",
                ) from error  # fmt: skip
