"""The flags of `megatron-ext compress`: known without torch."""

from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

SPLIT = "95,5,0"
SCALES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def number(text: str) -> float:
    """A number as people write it: `0.5`, `4e9`, `4B`.

    Raises:
        ArgumentTypeError: It is none, or not above 0.
    """
    scale = SCALES.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"a number above 0, such as 0.5, 4e9 or 4B, not {text!r}")
    return value


def whole(text: str) -> int:
    """The same of a number of tokens."""
    return int(number(text))


def add_arguments(parser: ArgumentParser) -> None:
    """The command's own flags; others are handed on to the jobs."""
    parser.add_argument(
        "model", nargs="?", type=Path, metavar="MODEL", help="what `megatron-ext convert --from hf` takes"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where all of it goes; it is gone on with"
    )
    parser.add_argument("--to", type=number, metavar="SIZE", help="parameters to keep: 0.5 a share, 4B a number")
    parser.add_argument("--tokens", type=whole, metavar="N", help="to distil on: 200K, 2B, ...")
    data = parser.add_argument_group("data")
    given = "text, source files or JSONL; by default the running Python's standard library"
    data.add_argument("--data", type=Path, nargs="+", metavar="FILE_OR_DIR", help=given)
    made = "instead: a data set of `megatron-ext data` with this model's tokenizer"
    data.add_argument("--data-path", nargs="+", metavar="PREFIX", help=made)
    data.add_argument("--split", metavar="A,B,C", help=f"of the data set (default: {SPLIT})")
    size = parser.add_argument_group("size of a step")
    length = "tokens of a sequence; by default the model's length, 2,048 at most"
    size.add_argument("--seq-length", type=int, metavar="N", help=length)
    batch = "sequences of a step; by default what makes about 200 steps, 256 at most"
    size.add_argument("--global-batch-size", type=int, metavar="N", help=batch)
    runs = parser.add_argument_group("how it runs")
    runs.add_argument("--processes", type=int, metavar="N", help="of this machine; by default one for each GPU, or one")
    launcher = "instead: what starts a command on all ranks, such as 'srun examples/rank.sh'"
    runs.add_argument("--launcher", metavar="WORDS", help=launcher)
    runs.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME", help="of lm-evaluation-harness, asked both models"
    )
    runs.add_argument("--verify", action="store_true", help="compare logits after each conversion")
    runs.add_argument("--recipe", type=Path, metavar="FILE", help="replay a recipe.yaml, as it was or edited")
    runs.add_argument("--dry-run", action="store_true", help="show the commands, memory and time, and start nothing")
    parser.epilog = (
        "Flags --prune-* go to pruning, --distill-* and those of training (--lr, --weight-decay, ...) to distillation, "
        "precision and layout (--bf16, --tensor-model-parallel-size, ...) to all jobs."
    )
