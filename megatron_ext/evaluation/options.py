"""The flags of `megatron-ext evaluate`, those of every kind of measure among them: known without torch."""

from argparse import ArgumentParser
from pathlib import Path

from megatron_ext.evaluation.measure import kinds
from megatron_ext.evaluation.measures.text import WINDOW
from megatron_ext.inference.options import add_checkpoint_arguments


def add_arguments(parser: ArgumentParser) -> None:
    """The subcommand's flags."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--save", type=Path, metavar="DIR", help="where results.json goes; by default the checkpoint's")
    parser.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (default: %(default)s)")
    window = f"tokens read at once; by default the model's length, of --text {WINDOW} at most"
    parser.add_argument("--window", type=int, metavar="N", help=window)
    for kind in kinds():
        kind.add_arguments(parser)
    parser.epilog = f"{parser.epilog} Interrupted by Ctrl-C or SIGTERM it keeps what was measured: status 130 or 143."
