"""Our flags: a frozen dataclass becomes a prefixed argparse group, and the parsed namespace the dataclass again.

    @dataclass(frozen=True)
    class DistillOptions:
        teacher: str | None = option(None, "Checkpoint of the teacher.")

    add_options(parser, DistillOptions, prefix="distill")      # --distill-teacher
    options = read_options(namespace, DistillOptions, prefix="distill")

Megatron's own flags keep Megatron's names; ours carry the job's prefix (`--prune-*`, `--distill-*`, `--ext-*`).
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

METAVARS = {int: "N", float: "X", str: "TEXT"}
"""What `--help` calls a value of a type."""


def option(default: Any, help: str, choices: Callable[[], Iterable[str]] | None = None) -> Any:
    """A dataclass field that becomes a flag.

    Args:
        default: Its value unless it is given.
        help: What it does. `%` needs no escaping.
        choices: Gives the legal values when a parser is made: a table may have grown by then.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def _argparse_type(annotation: Any) -> dict[str, Any]:
    """argparse keywords of a field's annotation: int, float, str, bool, Literal, list[...], or one of them | None."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (a for a in arguments if a is not type(None))
        return _argparse_type(inner)
    if origin is typing.Literal:
        return {"choices": arguments, "type": type(arguments[0])}
    if origin is list:
        return {"nargs": "+", **_argparse_type(arguments[0])}
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": annotation, "metavar": METAVARS.get(annotation)}


def add_options(parser: argparse.ArgumentParser, options: type, prefix: str) -> argparse.ArgumentParser:
    """Add one flag per field of the dataclass `options`, named `--{prefix}-{field}`, and return the parser."""
    doc = (options.__doc__ or "").strip().splitlines()[0]
    group = parser.add_argument_group(f"megatron_ext {prefix}", doc)
    annotations = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        keywords = _argparse_type(annotations[field.name])
        if field.metadata["choices"] is not None:
            keywords |= {"choices": tuple(field.metadata["choices"]()), "metavar": None}
        name = f"{prefix}-{field.name}".replace("_", "-")
        shown = field.metadata["help"].replace("%", "%%")
        if field.default is not None and keywords.get("action") is None:
            shown += " Default: %(default)s."
        group.add_argument(f"--{name}", default=field.default, help=shown, **keywords)
    return parser


def read_options[Options](namespace: argparse.Namespace, options: type[Options], prefix: str) -> Options:
    """The dataclass `options` with the values that were parsed into `namespace`."""
    names = [field.name for field in dataclasses.fields(options)]  # type: ignore[arg-type]
    return options(**{name: getattr(namespace, f"{prefix}_{name}") for name in names})


def to_flags(options: Any, prefix: str) -> list[str]:
    """The command line that `read_options` makes `options` of again; fields that are None are left out."""
    flags: list[str] = []
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), f"{prefix}-{field.name}".replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return flags
