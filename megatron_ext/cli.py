"""The console command `megatron-ext`: one subcommand per job.

A subcommand's module is imported when that subcommand is chosen, so that `megatron-ext --help` answers at once. Those
that run a model also take Megatron's own flags, and run on several ranks:
`torchrun --nproc-per-node 2 -m megatron_ext generate CHECKPOINT --tensor-model-parallel-size 2 ...`

Another package adds a job by an entry point of the group `megatron_ext.jobs`: the job's name, and its module, which has
`main(namespace)`, given the command line as `namespace.words`.
"""

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoints, entry_points, version
from typing import Any, Literal

from megatron_ext.errors import ConfigError, MegatronExtError, nearest
from megatron_ext.options import help
from megatron_ext.options.numbers import restrict

GROUP = "megatron_ext.jobs"


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        summary: One line for `megatron-ext --help`.
        module: What has its `main(namespace)`, and its `add_arguments(parser)` if it has flags of its own.
        flags: `own`: argparse knows them all. `megatron`: also Megatron's, which `main` finds in `megatron_flags`.
            `job`: the module parses the command line itself, which `main` finds in `words`.
        actions: What else it does, by the word that follows its name; without one it does what `module` does.
        options: MODULE:FUNCTION that adds its flags, where `module` has no `add_arguments`: one that is imported at
            once, so that a wrong flag is told in a moment.
    """

    summary: str
    module: str
    flags: Literal["own", "megatron", "job"] = "own"
    actions: Mapping[str, "Command"] = field(default_factory=dict)
    options: str = ""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Let a parser know its flags."""
        module, _, function = self.options.partition(":")
        adds = getattr(importlib.import_module(module), function) if self.options else self.load().add_arguments
        adds(parser)

    def load(self) -> Any:
        """Import what the subcommand needs."""
        return importlib.import_module(self.module)


@dataclass(frozen=True)
class AddedCommand(Command):
    """A subcommand of another package."""

    package: str = ""

    def load(self) -> Any:
        """Import its module.

        Raises:
            ConfigError: It, or what it needs, is not there; the other commands do not need it.
        """
        try:
            module = super().load()
        except ImportError as error:
            raise ConfigError(
                f"the package {self.package} adds this command, but its module {self.module} cannot be imported",
                got=error, legal=f"install {self.package} anew with what it needs, or uninstall it",
            ) from error  # fmt: skip
        if not hasattr(module, "main"):
            raise ConfigError(
                f"the package {self.package} adds this command, but its module has no function for it",
                got=self.module, legal="a module with main(namespace)",
            )  # fmt: skip
        return module


VISION = {
    name: Command(summary, f"megatron_ext.vision.{name}", options=f"megatron_ext.vision.command_options:{name}")
    for name, summary in {
        "evaluate": "measure an image classifier on labelled images",
        "predict": "say what pictures show, and draw them with it",
        "export": "write a network as ONNX or as a torch.export program",
    }.items()
}
COMMANDS = {
    "demo": Command("train a small model, halve it, distil it back, and report", "megatron_ext.demo.job"),
    "data": Command("turn text, source files or JSONL into Megatron's dataset", "megatron_ext.data.corpus"),
    "pretrain": Command(
        "train a model, or measure its loss (pretrain_hybrid.py)", "megatron_ext.pretraining.job", "job"
    ),
    "prune": Command("cut a trained model to a smaller one (prune_gpt.py)", "megatron_ext.pruning.job", "job"),
    "distill": Command("train a model to match another (distill_gpt.py)", "megatron_ext.distillation.job", "job"),
    "vision": Command("train an image classifier; evaluate, predict, export", "megatron_ext.vision.job", "job", VISION),
    "vision-segment": Command(
        "train a segmenter of images (UPerNet), or measure one", "megatron_ext.vision.segmentation.job", "job"
    ),
    "vision-detect": Command(
        "train a detector of objects (R-CNN), or measure one", "megatron_ext.vision.detection.job", "job"
    ),
    "compress": Command(
        "a Hugging Face model in, a smaller one out: all steps in one",
        "megatron_ext.compression.job",
        "megatron",
        options="megatron_ext.compression.options:add_arguments",
    ),
    "convert": Command(
        "convert between Hugging Face, GPTModel and checkpoints",
        "megatron_ext.conversion.job",
        options="megatron_ext.conversion.options:add_arguments",
    ),
    "evaluate": Command(
        "measure a checkpoint: text, tasks, long contexts",
        "megatron_ext.evaluation.job",
        "megatron",
        options="megatron_ext.evaluation.options:add_arguments",
    ),
    "generate": Command(
        "continue prompts",
        "megatron_ext.inference.job",
        "megatron",
        options="megatron_ext.inference.options:add_arguments",
    ),
    "estimate": Command(
        "parameters, memory, time and money of a training run, on paper", "megatron_ext.estimate", flags="megatron"
    ),
    "compare": Command("put several checkpoints side by side", "megatron_ext.evaluation.compare"),
    "verify": Command("look for damage in what was written here", "megatron_ext.verify"),
    "torchrun": Command(
        "torchrun, with ranks that are asked to stop rather than killed", "megatron_ext.torchrun", flags="job"
    ),
    "presets": Command("list the named architectures", "megatron_ext.models.presets_table"),
    "report": Command("draw a run directory's report again", "megatron_ext.demo.redraw"),
}


FORMS = {
    "prune": ("--load", {"mambavision": "megatron_ext.vision.pruning.job"}),
    "distill": ("--distill-teacher", {"mambavision": "megatron_ext.vision.distillation"}),
}
"""Jobs with a form for other families than language models: the flag of the checkpoint that decides; the modules."""


def commands(added: EntryPoints) -> dict[str, Command]:
    """Ours, and those that installed packages add under other names."""
    found: dict[str, Command] = {}
    for entry in added:
        package = entry.dist.name if entry.dist is not None else entry.value
        found[entry.name] = AddedCommand(f"a job of the package {package}", entry.value, "job", package=package)
    return found | COMMANDS


class _Version(argparse.Action):
    """Print the version, and those of the packages that results depend on, without importing them."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print them and end."""
        others = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "torch"))
        print(f"megatron-ext {version('megatron-ext')} ({others}, Python {platform.python_version()})")
        parser.exit()


def _refuse_taken(name: str, added: EntryPoints) -> None:
    """Say which packages want to be this command, which is ours: it stays so, and theirs is not run."""
    for entry in added.select(name=name):
        whose = f"the package {entry.dist.name}" if entry.dist is not None else entry.value
        print(f"warning: {whose} adds a job {name!r}, a name that is taken: it is not run", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; a user's mistake becomes one readable message and exit status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if help.asked(words) is not None and os.environ.get("RANK", "0") != "0":
        return 0  # the first rank of torchrun's says it
    added = entry_points(group=GROUP)
    known = commands(added)
    if argv is None and "_ARGCOMPLETE" in os.environ:
        from megatron_ext.completion import complete

        complete(known)  # and end
    if words and words[0] in COMMANDS:
        _refuse_taken(words[0], added)
    command = known[words[0]] if words and words[0] in known else None
    if command is not None and command.actions and words[1:] and words[1][:1] != "-":
        parser = argparse.ArgumentParser(prog=f"megatron-ext {words[0]}", description=_described(command))
        return _run(parser, command.actions, words[1:])
    if command is not None and command.flags == "job":
        return _run_job(words[0], command, words[1:])
    parser = argparse.ArgumentParser(prog="megatron-ext", description="Compress and train models on Megatron-Core.")
    parser.add_argument("--version", action=_Version, help="print the versions of this package and those it stands on")
    return _run(parser, known, words)


def _run(parser: argparse.ArgumentParser, known: Mapping[str, Command], words: list[str]) -> int:
    """Run the one of `known` that a command line asks for; argparse ends the program if it is none."""
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    run: Command | None = None
    own: list[str] = []
    if words and words[0][:1] != "-" and words[0] not in known:
        parser.error(f"no such command: {nearest(words[0], known)}")
    for name, command in known.items():
        sub = subparsers.add_parser(
            name, help=command.summary, description=_described(command), allow_abbrev=command.flags != "megatron"
        )
        if words[:1] == [name]:
            run = command
            command.add_arguments(sub)
            restrict(sub)
            own = [flag for action in sub._actions for flag in action.option_strings]
    args, rest = parser.parse_known_args(words)
    assert run is not None  # argparse has refused every other word
    if known[words[0]].flags == "megatron":
        args.megatron_flags = rest
    elif rest:
        from megatron_ext.options.early_flags import given_flags

        close = [get_close_matches(flag, own, n=1, cutoff=0.6) for flag, _ in given_flags(rest)]
        hint = "".join(f"; did you mean {flag}?" for flags in close for flag in flags)
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    try:
        run.load().main(args)
    except MegatronExtError as error:
        from megatron_ext.program import report

        # What was left to Megatron may be a flag of the command's own, without which it cannot work.
        return report(_mistyped(rest, own) or error)
    return 0


def _described(command: Command) -> str:
    return command.summary[0].upper() + command.summary[1:]


def _run_job(name: str, command: Command, words: list[str]) -> int:
    from megatron_ext import program

    return program.main(lambda: _job(name, command, words))


def _job(name: str, command: Command, words: list[str]) -> None:
    module = _form(name, command, words).load()
    if (word := help.asked(words)) is not None and hasattr(module, "JOB"):
        _explain(module.JOB, command, word)
    else:
        module.main(argparse.Namespace(words=words))


def _explain(job: Any, command: Command, word: str) -> None:
    """Print the flags of a job: the few that most need, or what of the rest was asked for."""
    from megatron_ext.options.readable import patch_parser
    from megatron_ext.training.command_line import add_flags

    parser = help.parser_of(job.name, _described(command))
    if command.actions:
        commands = parser.add_argument_group("or one of the commands, which have their own --help")
        for name, action in command.actions.items():
            commands.add_argument(name, help=action.summary)
    if word:
        _add_megatrons(parser)
    add_flags(parser, job)
    patch_parser(parser)
    print(help.about(parser, word) if word else help.short(parser, job.family.reads_text), end="")


def _form(name: str, command: Command, words: list[str]) -> Command:
    """The command for the family of the checkpoint that its flag names; what is wrong with that one, the job says."""
    if name not in FORMS:
        return command
    from megatron_ext.checkpoint import layout
    from megatron_ext.errors import CheckpointError
    from megatron_ext.options.early_flags import given_flags

    flag, modules = FORMS[name]
    path = dict(given_flags(words)).get(flag)
    try:
        family = layout.family(layout.find(path).path) if path else None
    except CheckpointError:
        return command
    return replace(command, module=modules[family]) if family in modules else command


def _mistyped(given: list[str], own: list[str]) -> ConfigError | None:
    """Of flags that a command left to Megatron the one that was meant for the command itself; None if there is none."""
    from megatron_ext.options.early_flags import given_flags

    for name, _ in given_flags(given):
        close = get_close_matches(name, own, n=1, cutoff=0.7)
        if close and name not in _megatron_flags():
            return ConfigError("unknown flag", got=name, legal=f"did you mean {close[0]!r}?")
    return None


def _add_megatrons(parser: argparse.ArgumentParser) -> None:
    from megatron_ext.models.bootstrap import prepare

    prepare()
    from megatron.training.arguments import add_megatron_arguments

    add_megatron_arguments(parser)


@cache
def _megatron_flags() -> set[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_megatrons(parser)
    return {name for action in parser._actions for name in action.option_strings}
