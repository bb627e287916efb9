"""`--help` of a job: its own flags and those of Megatron's that everybody needs; the other thousand when asked for.

`--help all` has every flag; `--help WORD` those with the word in their names or their texts.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

MOST_USED: dict[str, dict[str, str]] = {
    "the model": {
        "--preset NAME": "a name of `megatron-ext presets`, or a checkpoint whose architecture is taken",
        "--load DIR": "the checkpoint to go on from, or to work on; its model needs no flags",
        "--pretrained-checkpoint DIR": "begin with these weights",
        "--hybrid-layer-pattern PATTERN": "a model by its layers: M Mamba-2, * attention, - MLP, E experts",
    },
    "data": {
        "--data-path PREFIX": "of a data set that `megatron-ext data` wrote; several, each after its weight, are mixed",
        "--split A,B,C": "parts of it for training, validation and test",
        "--tokenizer-type NAME": "HuggingFaceTokenizer",
        "--tokenizer-model DIR": "where tokenizer.json is",
        "--seq-length N": "tokens of a sequence",
    },
    "training": {
        "--train-iters N": "steps in all",
        "--global-batch-size N": "sequences of a step",
        "--micro-batch-size N": "sequences that a rank has in memory at once",
        "--lr X": "the highest learning rate",
        "--min-lr X": "the lowest, at the end of its decay",
        "--lr-decay-style NAME": "constant, linear, cosine, ...",
        "--lr-warmup-iters N": "steps in which it rises from 0",
        "--clip-grad X": "the longest gradient; 0 for any",
        "--bf16": "compute in bfloat16, keep weights in float32",
        "--seed N": "of weights and order of samples",
    },
    "what is kept and measured": {
        "--save DIR": "the run directory: checkpoints, metrics.jsonl, config.yaml",
        "--save-interval N": "steps between checkpoints",
        "--eval-interval N": "steps between validations",
        "--eval-iters N": "batches of a validation",
        "--log-interval N": "steps between lines",
        "--skip-train": "measure the loss, and train nothing",
    },
    "the layout, under torchrun": {
        "--tensor-model-parallel-size N": "ranks that share each layer",
        "--sequence-parallel": "which then share the rest of the activations too",
        "--pipeline-model-parallel-size N": "ranks that share the layers out",
        "--context-parallel-size N": "ranks that share each sequence",
        "--expert-model-parallel-size N": "ranks that share the experts",
        "--use-distributed-optimizer": "spread the optimizer over the ranks that differ in their data",
        "--recompute-granularity NAME": "selective or full: compute activations again instead of keeping them",
    },
}
"""Of Megatron's flags and of those of every job the ones that nearly every command line has."""

OF_TEXT = frozenset(
    {"--hybrid-layer-pattern", "--data-path", "--split", "--tokenizer-type", "--tokenizer-model", "--seq-length",
     "--pipeline-model-parallel-size", "--context-parallel-size", "--expert-model-parallel-size",
     "--sequence-parallel"}
)  # fmt: skip
"""Those of language models alone."""


def program_name(job: str) -> str:
    """What a job's `--help` calls the program: a script by its name, else the command."""
    own = Path(sys.argv[0]).name
    return own if own.endswith(".py") and own != "__main__.py" else f"megatron-ext {job}"


def parser_of(job: str, summary: str) -> argparse.ArgumentParser:
    """A parser that has no flag yet but `--help`, and is there to be printed."""

    def formatter(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns))

    usage = f"{program_name(job)} FLAG ..."
    parser = argparse.ArgumentParser(
        usage=usage, description=summary, formatter_class=formatter, allow_abbrev=False, add_help=False
    )
    parser.add_argument("--help", metavar="[all|WORD]", help="this; every flag; those about a word: --help pipeline")
    return parser


def asked(words: Sequence[str]) -> str | None:
    """What `--help` on a command line asks for: `""` the short form, `all`, or a word; None if it is not there."""
    for place, word in enumerate(words):
        if word.startswith("--help="):
            return word.partition("=")[2]
        if word in ("-h", "--help"):
            after = words[place + 1] if place + 1 < len(words) else ""
            return "" if after.startswith("-") else after
    return None


def add_most_used(parser: argparse.ArgumentParser, reads_text: bool) -> None:
    """Let a parser know the flags that are used most, where it does not.

    Args:
        parser: Of a job's own flags.
        reads_text: Whether the job works on language models.
    """
    names = {name for action in parser._actions for name in action.option_strings}
    for title, flags in MOST_USED.items():
        group = parser.add_argument_group(title)
        for flag, text in flags.items():
            name, _, metavar = flag.partition(" ")
            if name not in names and (reads_text or name not in OF_TEXT):
                takes = {"metavar": metavar} if metavar else {"action": "store_true"}
                group.add_argument(name, help=text, **takes)  # type: ignore[arg-type]


def short(parser: argparse.ArgumentParser, reads_text: bool) -> str:
    """The flags of a job, which `parser` has, and those that are used most."""
    add_most_used(parser, reads_text)
    parser.epilog = (
        "Megatron's other flags keep their names, and work or are refused: --help all shows them, --help pipeline "
        "those about pipelines."
    )
    return parser.format_help()


def about(parser: argparse.ArgumentParser, word: str) -> str:
    """Every flag of a parser, or those that a word occurs in.

    Args:
        parser: All flags.
        word: `all`, or what to look for in names and texts.
    """
    if word == "all":
        return parser.format_help()
    formatter = parser._get_formatter()
    found = 0
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if _mentions(action, word)]
        if actions:
            formatter.start_section(group.title)
            formatter.add_arguments(actions)
            formatter.end_section()
        found += len(actions)
    return f"{found} flags about {word!r}\n\n{formatter.format_help()}" if found else f"no flag is about {word!r}\n"


def _mentions(action: argparse.Action, word: str) -> bool:
    texts = [*action.option_strings, *(name.replace("-", " ") for name in action.option_strings), action.help or ""]
    return any(word.lower() in text.lower() for text in texts if action.help != argparse.SUPPRESS)
