"""What a user can do wrong, as typed errors that say what, what was given, and what would be right."""

import difflib
from collections.abc import Iterable


class MegatronExtError(ValueError):
    """Base of every error a user can cause.

    Args:
        what: One sentence that says what is wrong.
        got: The value that was given, shown after "got:".
        legal: The values that would be accepted, or what to do, shown after "legal:".
    """

    def __init__(self, what: str, *, got: object = None, legal: object = None) -> None:
        lines = [what]
        if got is not None:
            lines.append(f"  got:   {got}")
        if legal is not None:
            lines.append(f"  legal: {legal}")
        super().__init__("\n".join(lines))


class ConfigError(MegatronExtError):
    """A flag, a preset, a pattern or a combination of them is not usable."""


class CheckpointError(MegatronExtError):
    """A checkpoint is missing, damaged, incomplete, or belongs to another model."""


class UntrustedError(CheckpointError):
    """A file asks for code, or for a place outside of its directory. It gets neither."""


class DataError(MegatronExtError):
    """Input data is missing, empty or not readable as what it claims to be."""


class PlanError(MegatronExtError):
    """A pruning plan or score file does not fit the model, or no plan reaches the target."""


def nearest(got: str, names: Iterable[str]) -> str:
    """The legal names, preceded by "did you mean ...?" when one of them is close to `got`."""
    names = list(names)
    close = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return hint + "one of " + ", ".join(names)
