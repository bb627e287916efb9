"""Commands and flags at the press of TAB: `eval "$(register-python-argcomplete megatron-ext)"` in a shell's profile."""

import argparse
import os
from collections.abc import Mapping
from typing import Any

import argcomplete

from megatron_ext.options import help

ASKED = "_ARGCOMPLETE"
"""In the environment where a shell asks what may follow."""


def complete(known: Mapping[str, Any]) -> None:
    """Answer the shell, and end.

    Args:
        known: The commands of `cli`, by name.
    """
    argcomplete.autocomplete(parser_of(known, os.environ["COMP_LINE"].split()[1:]))


def parser_of(known: Mapping[str, Any], words: list[str]) -> argparse.ArgumentParser:
    """A parser of all commands; of the flags it knows those of the command that has been typed."""
    parser = argparse.ArgumentParser(prog="megatron-ext")
    parser.add_argument("--version", action="store_true")
    subparsers = parser.add_subparsers()
    for name, command in known.items():
        sub = subparsers.add_parser(name, help=command.summary, conflict_handler="resolve")
        if words[:1] != [name]:
            continue
        if command.actions and words[1:2] and words[1] in command.actions:
            actions = sub.add_subparsers()
            command.actions[words[1]].add_arguments(actions.add_parser(words[1]))
        elif command.flags == "job":
            _add_job(sub, command)
        else:
            command.add_arguments(sub)
        if command.flags == "megatron":
            help.add_most_used(sub, reads_text=True)
    return parser


def _add_job(sub: argparse.ArgumentParser, command: Any) -> None:
    """The flags of a job, those that are used most, and the words that stand for its other actions."""
    if command.actions:
        actions = sub.add_subparsers()
        for word, action in command.actions.items():
            actions.add_parser(word, help=action.summary)
    job = getattr(command.load(), "JOB", None)
    if job is not None:
        from megatron_ext.training.command_line import add_flags

        add_flags(sub, job)
        help.add_most_used(sub, job.family.reads_text)
