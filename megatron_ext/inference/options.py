"""The flags of commands that open a checkpoint, and of `megatron-ext generate`: known without torch."""

from argparse import ArgumentParser
from pathlib import Path

TYPES = {"float32": [], "bfloat16": ["--bf16"], "float16": ["--fp16"]}
"""By the name of a type Megatron's flags for it."""


def add_checkpoint_arguments(parser: ArgumentParser) -> None:
    """The flags of every job that opens a checkpoint."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint directory, or a step in one")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="by default the one it was trained with")
    parser.add_argument("--dtype", choices=list(TYPES), help="the type of the weights; by default the one they have")
    parser.epilog = "Megatron's own flags say the layout: --tensor-model-parallel-size 2, ..."


def add_arguments(parser: ArgumentParser) -> None:
    """The subcommand's flags."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help='a prompt on each line; JSON Lines: its "prompt"')
    parser.add_argument("--chat", action="store_true", help="prompts as questions in the tokenizer's chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a new .jsonl instead of standard output")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a continuation before it")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the token that ends a document")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (default: %(default)s)")
    sampling = parser.add_argument_group("sampling", "greedy by default; the same on every layout and in every batch")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the most probable token")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable; 0: all")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from those of probability P")
    sampling.add_argument("--draw-seed", type=int, default=0, metavar="N", help="default: %(default)s")
    stopped = "Interrupted by Ctrl-C or SIGTERM it keeps what there is in OUTPUT.partial: status 130 or 143."
    parser.epilog = f"{parser.epilog} {stopped}"
