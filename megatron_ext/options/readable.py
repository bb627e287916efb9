"""What Megatron says of a wrong command line, in words that name the flags, what was given and what would be right."""

import argparse
import ast
import re
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, NoReturn

from megatron_ext.errors import ConfigError, MegatronExtError, nearest
from megatron_ext.options.numbers import restrict

WORDS: dict[type[ast.AST], str] = {
    ast.Eq: "equal to", ast.NotEq: "other than", ast.Lt: "less than", ast.LtE: "at most", ast.Gt: "greater than",
    ast.GtE: "at least", ast.In: "one of", ast.NotIn: "none of",
}  # fmt: skip


class Mood(NamedTuple):
    """How a condition is said."""

    given: str
    absent: str
    be: str


MUST = Mood("is needed", "must not be given", "must be")
IS = Mood("is given", "is not given", "is")


def patch_parser(parser: argparse.ArgumentParser) -> None:
    """Refuse wrong flags in a few lines instead of Megatron's 600 of usage, and make its `--help` work."""
    restrict(parser)
    names = [name for action in parser._actions for name in action.option_strings]

    def refuse(message: str) -> NoReturn:
        raise _wrong_flag(message, names)

    parser.error = refuse  # type: ignore[method-assign]
    for action in parser._actions:
        if action.help:  # a bare % in one of Megatron's texts
            action.help = re.sub(r"%(%|\(\w+\)s)?", lambda found: found[0] if found[1] else "%%", action.help)


def _wrong_flag(message: str, names: list[str]) -> ConfigError:
    """What argparse says, which knows flags by all their names and values by their legal ones."""
    if found := re.match(r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)$", message):
        got, legal = found[2].strip("'"), [word.strip("' ") for word in found[3].split(",")]
        return ConfigError(f"{found[1]}: no such value", got=got, legal=nearest(got, legal))
    if found := re.match(r"argument (\S+): (.+), not (['\"])(.*)\3$", message, re.DOTALL):
        return ConfigError(f"{found[1]}: no such value", got=found[4], legal=found[2])
    if found := re.match(r"argument (\S+): invalid (\S+) value: (.*)$", message, re.DOTALL):
        return ConfigError(f"{found[1]}: no such value", got=found[3].strip("'"), legal=f"a value of {found[2]}")
    unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
    if not message.startswith("unrecognized arguments") or not unknown:
        return ConfigError(message, legal="see --help")
    meant = [f"{name}: {_meant(name, names)}" for name in unknown[:3]]
    return ConfigError(message if len(message) < 300 else message[:300] + " ...", legal="; ".join(meant))


def _meant(name: str, names: list[str]) -> str:
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "no flag is like it, see --help"


@contextmanager
def readable(args: Namespace, parser: argparse.ArgumentParser) -> Iterator[None]:
    """Megatron refuses flags by assertion; say so in our form.

    Args:
        args: What it validates.
        parser: What it was parsed with.
    """
    try:
        yield
    except (AssertionError, ValueError, RuntimeError, ImportError) as error:
        if isinstance(error, MegatronExtError):
            raise
        raise _refusal(error, _Flags(args, parser)) from error


def _refusal(error: Exception, flags: "_Flags") -> ConfigError:
    if isinstance(error, ModuleNotFoundError) and error.name:
        asking = flags.given_of(f"{error.name}*")
        return ConfigError(
            f"the package {error.name} is not installed",
            got=", ".join(asking) or None,
            legal=f"pip install {error.name}",
        )
    summary = traceback.extract_tb(error.__traceback__)[-1]
    statement, conditions = _statement(summary)
    wanted = statement.test if isinstance(statement, ast.Assert) else None
    names = flags.named(*([] if wanted is None else [wanted]), *reversed(conditions))
    reason = " ".join(str(error).split())
    if wanted is not None and reason in ("", ast.unparse(wanted)):
        reason = flags.words(wanted)
        if held := [flags.words(condition, IS) for condition in conditions]:
            reason += f", where {' and '.join(held)}"
    got = ", ".join(dict.fromkeys(flags.given(name) for name in names))
    return ConfigError(f"Megatron refuses this combination of flags: {reason or summary.line}", got=got or None)


def _statement(summary: traceback.FrameSummary) -> tuple[ast.stmt | None, list[ast.expr]]:
    """The statement that raised, and the conditions under which it runs, the outermost first."""
    line, conditions = summary.lineno or 0, []
    try:
        body: list[ast.stmt] = ast.parse(Path(summary.filename).read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None, []
    while True:
        around = [each for each in body if each.lineno <= line <= (each.end_lineno or 0)]
        if not around:
            return None, conditions
        statement = around[0]
        blocks = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(statement, "handlers", [])]
        inner = next((b for b in blocks if b and b[0].lineno <= line <= (b[-1].end_lineno or 0)), None)
        if inner is None:
            return statement, conditions
        if isinstance(statement, ast.If):
            negated = inner is statement.orelse
            conditions.append(ast.UnaryOp(ast.Not(), statement.test) if negated else statement.test)
        body = inner


class _Flags:
    """Megatron's `args.NAME` as the flags that people write."""

    def __init__(self, args: Namespace, parser: argparse.ArgumentParser) -> None:
        self._args = args
        self._actions = {action.dest: action for action in reversed(parser._actions) if action.option_strings}

    def named(self, *expressions: ast.expr) -> list[str]:
        """The flags that occur in expressions, in order."""
        found = [self._name(node) for expression in expressions for node in ast.walk(expression)]
        return list(dict.fromkeys(name for name in found if name is not None))

    def _name(self, node: ast.AST) -> str | None:
        named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
        return node.attr if named and node.attr in self._actions else None  # type: ignore[union-attr]

    def given_of(self, pattern: str) -> list[str]:
        """The flags of a name that were given."""
        found = [name for name, action in self._actions.items() if fnmatchcase(name, pattern) and action.nargs != 0]
        return [self.given(name) for name in found if getattr(self._args, name, None) != self._actions[name].default]

    def given(self, name: str) -> str:
        """A flag as it was given, or as Megatron has it."""
        action, value = self._actions[name], getattr(self._args, name, None)
        flag = action.option_strings[0]
        if action.nargs == 0:
            return flag if value == action.const else f"no {flag}"
        return f"no {flag}" if value is None else f"{flag} {value}"

    def words(self, node: ast.expr, mood: Mood = MUST) -> str:
        """A condition as a sentence, of what must be or of what is."""
        if isinstance(node, ast.BoolOp):
            link = " and " if isinstance(node.op, ast.And) else " or "
            return link.join(self.words(value, mood) for value in node.values)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            if (name := self._name(node.operand)) is not None:
                return self._presence(name, False, mood)
            return f"not ({self.words(node.operand, mood)})"
        if (name := self._name(node)) is not None:
            return self._presence(name, True, mood)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right, kind = node.left, node.comparators[0], type(node.ops[0])
            if kind in (ast.Is, ast.IsNot):
                given = (kind is ast.IsNot) == (isinstance(right, ast.Constant) and right.value in (None, False))
                return f"{self._plain(left)} {mood.given if given else mood.absent}"
            if isinstance(left, ast.BinOp) and isinstance(left.op, ast.Mod) and self._plain(right) == "0":
                return f"{self._plain(left.left)} {mood.be} a multiple of {self._plain(left.right)}"
            return f"{self._plain(left)} {mood.be} {WORDS[kind]} {self._plain(right)}"
        return self._plain(node)

    def _presence(self, name: str, wanted: bool, mood: Mood) -> str:
        action = self._actions[name]
        if action.nargs == 0 and action.const is False:  # such as --disable-bias-linear
            wanted = not wanted
        return f"{action.option_strings[0]} {mood.given if wanted else mood.absent}"

    def _plain(self, node: ast.expr) -> str:
        """Python's text of an expression, with flags for names."""
        actions = self._actions

        def flag(found: re.Match[str]) -> str:
            return actions[found[1]].option_strings[0] if found[1] in actions else found[0]

        return re.sub(r"\bargs\.(\w+)", flag, ast.unparse(node))
