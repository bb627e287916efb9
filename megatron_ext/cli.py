"""The console command `megatron-ext`: one subcommand per job.

A subcommand's module is imported when that subcommand is chosen, so that `megatron-ext --help` answers at once. Those
that run a model also take Megatron's own flags, and run on several ranks:
`torchrun --nproc-per-node 2 --no-python megatron-ext generate CHECKPOINT --tensor-model-parallel-size 2 ...`
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import DataError, MegatronExtError, nearest

if TYPE_CHECKING:
    from megatron_ext.models.presets import Preset

PATTERN_SHOWN = 15  # characters of a layer pattern in the table, which fits into 80 columns


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        summary: One line for `megatron-ext --help`.
        load: Imports what the subcommand needs; returns its `add_arguments(parser)` and its `main(namespace)`.
        runs_model: It takes Megatron's flags too: `main` finds what is not its own in `megatron_flags`.
        own_parser: It parses its command line itself: `main` finds it in `words`.
    """

    summary: str
    load: Callable[[], tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]]
    runs_model: bool = False
    own_parser: bool = False


def _module(name: str) -> Callable[[], tuple[Any, Any]]:
    def load() -> tuple[Any, Any]:
        module = importlib.import_module(name)
        return module.add_arguments, module.main

    return load


def _torchrun() -> tuple[Any, Any]:
    from megatron_ext.training.torchrun import main

    return lambda parser: None, main


def _presets_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object, with whole patterns and architectures")


def _presets(args: argparse.Namespace) -> None:
    """Print every preset with its number of parameters, counted from the architecture, beside the published one."""
    from megatron_ext.models.presets import PRESETS

    if args.json:
        print(json.dumps({name: _preset_values(preset) for name, preset in PRESETS.items()}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("preset", no_wrap=True)
    table.add_column("layers", no_wrap=True)
    for name in ("hidden", "parameters", "published", "ref"):
        table.add_column(name, justify="right", no_wrap=True)
    sources: list[str] = []
    for name, preset in PRESETS.items():
        architecture = preset.architecture
        counted, published = _short(architecture.num_parameters()), preset.parameters
        if preset.non_embedding is not None:
            counted += f" ({_short(architecture.num_parameters(embedding=False))})"
            published += f" ({preset.non_embedding})"
        if preset.source not in sources:
            sources.append(preset.source)
        reference = str(1 + sources.index(preset.source))
        layers = _abbreviated(architecture.pattern)
        table.add_row(name, layers, f"{architecture.hidden_size:,}", counted, published, reference)
    console = Console(width=max(80, Console().width))
    console.print(table, markup=False, highlight=False)
    notes = ["layers: M Mamba-2, * attention, - MLP; parameters in brackets: without embeddings"]
    notes += [f"{number} {source}" for number, source in enumerate(sources, start=1)]
    console.print("\n".join(notes), markup=False, highlight=False, soft_wrap=True)


def _preset_values(preset: "Preset") -> dict[str, Any]:
    architecture = preset.architecture
    return {
        "architecture": architecture.to_dict(),
        "parameters": architecture.num_parameters(),
        "non_embedding_parameters": architecture.num_parameters(embedding=False),
        "published": preset.parameters,
        "published_non_embedding": preset.non_embedding,
        "source": preset.source,
    }


def _abbreviated(pattern: str) -> str:
    """`*-*-*-*-` as "4 x *-"; a long pattern that does not repeat is cut, with its length in brackets."""
    for length in range(1, len(pattern) // 2 + 1):
        if pattern == pattern[:length] * (len(pattern) // length):
            return f"{len(pattern) // length} x {pattern[:length]}"
    if len(pattern) <= PATTERN_SHOWN:
        return pattern
    ending = f"... ({len(pattern)})"
    return pattern[: PATTERN_SHOWN - len(ending)] + ending


def _short(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a demo's directory, or the --save of a training job")


def _report(args: argparse.Namespace) -> None:
    """Draw a run directory's report again from its numbers: `report.json` of a demo, else `metrics.jsonl`."""
    run: Path = args.run
    if not run.is_dir():
        raise DataError("no such run directory", got=run, legal="the --out of a demo or the --save of a training job")
    numbers, metrics = run / "report.json", run / "metrics.jsonl"
    if not numbers.is_file() and not metrics.is_file():
        raise DataError("nothing to report on", got=run, legal="a directory with report.json or metrics.jsonl")
    from megatron_ext.evaluation.report import plot_training, write_report

    if numbers.is_file():
        try:
            measured = json.loads(numbers.read_text())
        except ValueError as error:
            raise DataError(f"the report's numbers are not JSON: {error}", got=numbers) from error
        if not isinstance(measured, dict):
            raise DataError("the report's numbers are not an object", got=numbers)
        write_report(run, measured)
        print(f"wrote {run / 'report.md'} and {run / 'report.png'}")
    if metrics.is_file():
        plot_training(metrics, run / "metrics.png")
        print(f"wrote {run / 'metrics.png'}")


COMMANDS = {
    "demo": Command("train a small model, halve it, distil it back, and report", _module("megatron_ext.training.demo")),
    "data": Command(
        "turn text, source files or JSONL into Megatron's dataset", _module("megatron_ext.training.corpus")
    ),
    "convert": Command(
        "convert between Hugging Face, GPTModel and checkpoints", _module("megatron_ext.training.convert")
    ),
    "evaluate": Command(
        "measure a checkpoint: text, tasks, long contexts",
        _module("megatron_ext.training.measure"),
        runs_model=True,
    ),
    "generate": Command("continue prompts", _module("megatron_ext.training.generate"), runs_model=True),
    "estimate": Command(
        "parameters, memory, time and money of a training run, on paper",
        _module("megatron_ext.training.estimate"),
        runs_model=True,
    ),
    "compare": Command("put several checkpoints side by side", _module("megatron_ext.evaluation.compare")),
    "verify": Command("look for damage in what was written here", _module("megatron_ext.training.integrity")),
    "torchrun": Command("torchrun, with ranks that are asked to stop rather than killed", _torchrun, own_parser=True),
    "presets": Command("list the named architectures", lambda: (_presets_arguments, _presets)),
    "report": Command("draw a run directory's report again", lambda: (_report_arguments, _report)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; a user's mistake becomes one readable message and exit status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="megatron-ext", description="Compress and train language models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = words[0] if words else None
    run: Callable[[argparse.Namespace], None] | None = None
    own: list[str] = []
    if chosen is not None and chosen[:1] != "-" and chosen not in COMMANDS:
        parser.error(f"no such command: {nearest(chosen, COMMANDS)}")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.summary, description=command.summary[0].upper() + command.summary[1:],
            allow_abbrev=not command.runs_model,
        )  # fmt: skip
        if name == chosen:
            add_arguments, run = command.load()
            add_arguments(sub)
            own = [flag for action in sub._actions for flag in action.option_strings]
    if chosen is not None and run is not None and COMMANDS[chosen].own_parser:
        args, rest = argparse.Namespace(words=words[1:]), []
    else:
        args, rest = parser.parse_known_args(words)
    assert run is not None  # argparse has refused every other word
    if COMMANDS[words[0]].runs_model:
        args.megatron_flags = rest
    elif rest:
        close = [get_close_matches(word.split("=")[0], own, n=1, cutoff=0.6) for word in rest if word[:2] == "--"]
        hint = "".join(f"; did you mean {flag}?" for flags in close for flag in flags)
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    try:
        run(args)
    except MegatronExtError as error:
        from megatron_ext.training.program import report
        from megatron_ext.training.refusals import mistyped

        # What was left to Megatron may be a flag of the command's own, without which it cannot work.
        return report(mistyped(rest, own) or error)
    return 0
