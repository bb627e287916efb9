"""Our flags, job by job, as text: `python tests/support/flag_list.py > tests/unit/flags.txt` writes the list anew.

A line says a flag's names, what it takes, and its default. Megatron's flags are not ours; the parsers are those that
the commands meet.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace

from megatron_ext import cli
from megatron_ext.inference import session
from megatron_ext.models.bootstrap import prepare
from megatron_ext.training.command_line import parse_command_line
from megatron_ext.training.job import Job


def job_flags(job: Job) -> list[argparse.Action]:
    """The flags of a job that are not Megatron's."""
    met: list[argparse.Action] = []

    def parse_args(extra_args_provider):
        parser = arguments.add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
        megatrons = len(parser._actions)
        met.extend(extra_args_provider(parser)._actions[megatrons:])
        raise SystemExit

    prepare()
    from megatron.training import arguments

    before, arguments.parse_args = arguments.parse_args, parse_args
    try:
        preset = next(iter(getattr(job.family, "presets", ["tiny-hybrid"])))
        parse_command_line(job, ["--preset", preset, "--dry-run"])
    except SystemExit:
        assert met, "the command line is not parsed by Megatron"
    finally:
        arguments.parse_args = before
    return met


def command_flags(command: cli.Command) -> list[argparse.Action]:
    """The flags of a command; Megatron's, and torchrun's, are not ours."""
    if command.flags == "job":
        module = command.load()
        return job_flags(module.JOB) if hasattr(module, "JOB") else []
    parser = argparse.ArgumentParser(add_help=False)
    command.add_arguments(parser)
    taken = job_flags(session.JOB) if command.flags == "megatron" else []
    return [*parser._actions, *taken]


def line(action: argparse.Action) -> str:
    """A flag with all that a command line may say of it: `--prune-samples int = 1024`."""
    words = [", ".join(action.option_strings) or action.dest]
    if action.choices is not None:
        words.append("{" + ", ".join(map(str, action.choices)) + "}")
    elif action.nargs == 0:
        words.append("switch")
    else:
        words.append(getattr(action.type, "__name__", "str"))
    if action.nargs:
        words.append(f"x {action.nargs}")
    if isinstance(action, argparse._AppendAction):
        words.append("each time")
    words.append("required" if action.required else f"= {action.default}")
    return " ".join(words)


def lines() -> Iterator[str]:
    """The whole list; a form of a job for another family of models follows the job."""
    for name, command in cli.COMMANDS.items():
        forms = {name: command}
        if name in cli.FORMS:
            _, modules = cli.FORMS[name]
            forms |= {f"{name}, {family}": replace(command, module=module) for family, module in modules.items()}
        forms |= {f"{name} {word}": action for word, action in command.actions.items()}
        for title, form in forms.items():
            yield f"{title}:"
            yield from sorted(f"    {line(action)}" for action in command_flags(form))


if __name__ == "__main__":
    os.environ["MEGATRON_EXT_DEVICE"] = "cpu"
    print("\n".join(lines()))
