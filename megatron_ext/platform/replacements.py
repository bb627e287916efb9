"""A reversible table of replaced names: the only mechanism by which this package alters foreign modules."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MISSING = object()
_installed: list["Replacement"] = []
_originals: list[object] = []


@dataclass(frozen=True)
class Replacement:
    """One foreign name that is replaced.

    Attributes:
        owner: The module or class that holds the name.
        name: The attribute.
        value: What it becomes.
        reason: What it stands in for, and when.
    """

    owner: Any
    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{getattr(self.owner, '__name__', self.owner)}.{self.name}: {self.reason}"


def _distinct(value: Any) -> Any:
    # torch._dynamo's trace rules reject one function object that is known under two torch names.
    if isinstance(value, types.FunctionType) and value.__closure__ is None:
        return types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__)
    return value


def replace(owner: Any, name: str, value: Any, reason: str) -> None:
    """Replace `owner.name` and remember the original, so that `restore` brings it back."""
    _installed.append(Replacement(owner, name, value, reason))
    _originals.append(owner.__dict__.get(name, _MISSING))
    setattr(owner, name, _distinct(value))


def restore() -> None:
    """Undo every replacement, the last one first."""
    while _installed:
        entry, original = _installed.pop(), _originals.pop()
        if original is _MISSING:
            delattr(entry.owner, entry.name)
        else:
            setattr(entry.owner, entry.name, original)


def table() -> Iterator[Replacement]:
    """What is replaced at present, in the order of installation."""
    return iter(tuple(_installed))
