"""Megatron's arguments, and mappings between them and fields of an `Architecture`; see `megatron_args.TABLE`."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class Argument:
    """An argument of Megatron's that describes a model.

    Attributes:
        name: In its namespace.
        default: Megatron's own; what a namespace means that lacks it, as those of older versions do.
        flag: On its command line, by default the name's. One without a value says that it is not the default.
        kind: The type of its values, where the default does not show it.
        required: Whether there is no model without it.
        help: Of a flag of ours, which Megatron's parser does not know; said only where it is not the default.
    """

    name: str
    default: Any = None
    flag: str = ""
    kind: type | None = None
    required: bool = False
    help: str = ""

    def of(self, args: Namespace) -> Any:
        """Its value.

        Raises:
            AttributeError: The namespace lacks it, and it is required.
            ConfigError: It is required, and not given.
        """
        value = getattr(args, self.name) if self.required else getattr(args, self.name, None)
        if value is None and self.required:
            raise ConfigError(f"{self._flag} is missing", legal="a positive whole number")
        return self.default if value is None else value

    def to_flags(self, value: Any) -> list[str]:
        """The command line that says a value: at most one word, for a pattern may begin with "-", as a flag does."""
        if self.help and value == self.default:
            return []
        if isinstance(self.default, bool):
            return [] if value == self.default else [self._flag]
        text = repr(value) if isinstance(value, float) else str(value)
        return [] if value in (None, "") else [f"{self._flag}={text}"]

    def add_to(self, parser: ArgumentParser) -> None:
        """Let a parser know it; None where it is not given."""
        if isinstance(self.default, bool):
            parser.add_argument(
                self._flag, dest=self.name, action="store_const", const=not self.default, help=self.help or None
            )
        else:
            kind = self.kind or (int if self.default is None else type(self.default))
            parser.add_argument(self._flag, dest=self.name, type=kind, help=self.help or None)

    @property
    def _flag(self) -> str:
        return self.flag or f"--{self.name.replace('_', '-')}"


class ArgumentMapping(Protocol):
    """How Megatron's arguments say a field.

    Attributes:
        arguments: Those that it takes on the command line.
    """

    arguments: tuple[Argument, ...]

    def read(self, args: Namespace) -> Any:
        """The field's value."""
        ...

    def write(self, value: Any) -> dict[str, Any]:
        """The arguments, as Megatron would have parsed them."""
        ...


class Renamed:
    """A field that is an argument, maybe under another name."""

    def __init__(self, argument: Argument, fill: Callable[[Namespace], Any] | None = None) -> None:
        """Map a field.

        Args:
            argument: The argument.
            fill: What Megatron makes of one that is not given, or zero.
        """
        self.arguments, self._fill = (argument,), fill

    def read(self, args: Namespace) -> Any:
        """The field."""
        value = self.arguments[0].of(args)
        return value if value or self._fill is None else self._fill(args)

    def write(self, value: Any) -> dict[str, Any]:
        """The argument."""
        return {self.arguments[0].name: value}


class Count(Renamed):
    """A number that is None in Megatron where it is zero here."""

    def __init__(self, argument: Argument, fill: Callable[[Namespace], Any] = lambda args: 0) -> None:
        super().__init__(argument, fill)

    def write(self, value: Any) -> dict[str, Any]:
        """The argument."""
        return super().write(value or None)
