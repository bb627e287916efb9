"""Names of files that somebody else's file brings along: none leads out of its directory."""

from pathlib import Path

from megatron_ext.errors import UntrustedError


def inside(directory: Path, name: str) -> Path:
    """The path of a file that something in a directory names, whether it is there or not.

    A snapshot in Hugging Face's cache, `models--NAME/snapshots/REVISION`, reaches into `blobs` beside `snapshots`.

    Raises:
        UntrustedError: It lies, or a symbolic link leads, outside the directory.
    """
    path, legal = directory / name, "files in the directory itself; copy what a link points to: cp -rL"
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UntrustedError(f"a file outside of its directory is named: {name!r}", got=directory, legal=legal)
    try:
        home, real = directory.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop, a null byte
        raise UntrustedError(f"{name!r} is no name of a file ({error})", got=directory, legal=legal) from error
    homes = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(each) for each in homes):
        raise UntrustedError(f"a symbolic link leads out of the directory: {name!r}", got=directory, legal=legal)
    return path
