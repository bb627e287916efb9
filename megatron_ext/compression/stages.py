"""The commands that a compression is made of, in order."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from megatron_ext.workflow import Stage

ORIGINAL, PRUNED, DISTILLED, EXPORTED = "original", "pruned", "distilled", "huggingface"
STEPS, LARGEST_BATCH = 200, 256
LONGEST = 2048
SHARED = (
    "--bf16", "--fp16", "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--sequence-parallel",
    "--context-parallel-size", "--expert-model-parallel-size", "--expert-tensor-parallel-size", "--micro-batch-size",
    "--ext-ssm-backend", "--seed",
)  # fmt: skip
"""What of Megatron's flags concerns every job, and not training alone."""
OF_DATA = ("--bf16", "--fp16", "--micro-batch-size", "--seed")
"""Those of them that an evaluation settles itself."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        model: The Hugging Face model.
        out: Where everything goes.
        to: Parameters to keep: up to 1 a share of them.
        tokens: To distil on.
        data: What a data set is made of; empty: the Python standard library.
        data_path: A data set that is there already, as `--data-path` takes it.
        split: Of the data set.
        sequence: Tokens of a sequence.
        batch: Sequences of a step.
        parameters: Of the original.
        tasks: Of lm-evaluation-harness.
        verify: Whether conversions compare logits.
        flags: Handed on to the jobs.
    """

    model: Path
    out: Path
    to: float | None
    tokens: int
    data: tuple[Path, ...]
    data_path: tuple[str, ...]
    split: str
    sequence: int
    batch: int
    parameters: int
    tasks: tuple[str, ...] = ()
    verify: bool = False
    flags: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Of distillation."""
        return max(1, self.tokens // (self.sequence * self.batch))


def batch_of(tokens: int, sequence: int, ranks: int) -> int:
    """Sequences of a step that make about 200 steps of a budget, as many for each of `ranks`."""
    wanted = min(LARGEST_BATCH, tokens // (sequence * STEPS))
    return max(1, wanted // ranks) * ranks


def learning_rate(parameters: int) -> float:
    """The highest learning rate: 1e-4 at 8B, by the inverse root of the size for smaller models, 1e-3 at most."""
    return float(f"{min(1e-3, 1e-4 * max(1.0, sqrt(8e9 / parameters))):.1g}")


def split_flags(flags: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Flags by whom they concern: `prune`, `distill`, or `all` jobs; of these the `layout`.

    A value stays with its flag: it is what stands between it and the next flag.
    """
    found: dict[str, list[str]] = {"prune": [], "distill": [], "all": [], "layout": []}
    own: tuple[str, ...] = ("distill",)
    for word in flags:
        if word.startswith("--"):
            name = word.partition("=")[0]
            own = ("prune",) if name.startswith("--prune-") else ("all",) if name in SHARED else ("distill",)
            own += ("layout",) if name in SHARED and name not in OF_DATA else ()
        for each in own:
            found[each].append(word)
    return {name: tuple(words) for name, words in found.items()}


def stages(request: Request) -> list[Stage]:
    """All commands of a compression."""
    out, flags = request.out, split_flags(request.flags)
    original, pruned, distilled = (str(out / name) for name in (ORIGINAL, PRUNED, DISTILLED))
    data = (
        "--data-path", *(request.data_path or (str(out / "data" / "text_document"),)), "--split", request.split,
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{original}/huggingface",
        "--seq-length", str(request.sequence), "--global-batch-size", str(request.batch), *flags["all"],
    )  # fmt: skip
    verify = ("--verify",) if request.verify else ()
    target = ("--prune-target-params", str(request.to)) if request.to is not None else ()

    def measured(name: str) -> Stage:
        directory = out / "validation" / name
        words = ("pretrain", "--skip-train", "--pretrained-checkpoint", str(out / name), *data)
        return Stage(f"measure {name}", (*words, "--save", str(directory), "--save-interval", "1"), directory)

    def asked(name: str) -> Stage:
        directory = out / "tasks" / name
        words = ("evaluate", str(out / name), "--save", str(directory), "--tasks", *request.tasks)
        return Stage(f"ask {name}", (*words, *flags["layout"]), directory)

    steps, lr = request.steps, learning_rate(request.parameters)
    training = (
        "--train-iters", str(steps), "--lr", f"{lr:g}", "--min-lr", f"{lr / 10:g}", "--lr-decay-style", "cosine",
        "--lr-warmup-iters", str(steps // 20), "--weight-decay", "0.1", "--adam-beta2", "0.95", "--clip-grad", "1.0",
        "--eval-interval", str(-(-steps // 10)), "--eval-iters", "4", "--save-interval", str(-(-steps // 5)),
    )  # fmt: skip
    found = [
        Stage(
            "convert the model", ("convert", "--from", "hf", "--to", "megatron", str(request.model), original, *verify),
            out / ORIGINAL, output="latest_checkpointed_iteration.txt", parallel=False,
        ),
        measured(ORIGINAL),  # first, because it finds out what is wrong with the data
        Stage(
            "score, plan and cut", ("prune", "--load", original, "--save", pruned, *target, *data, *flags["prune"]),
            out / PRUNED, output="plan.json",
        ),
        measured(PRUNED),
        Stage(
            "distil the original into the rest",
            ("distill", "--distill-teacher", original, "--pretrained-checkpoint", pruned, "--load", distilled,
             "--save", distilled, *data, *training, *flags["distill"]),
            out / DISTILLED, steps,
        ),
        measured(DISTILLED),
        *((asked(ORIGINAL), asked(DISTILLED)) if request.tasks else ()),
        Stage(
            "convert it back",
            ("convert", "--from", "megatron", "--to", "hf", distilled, str(out / EXPORTED), "--like", original,
             *verify),
            out / EXPORTED, output="config.json", parallel=False,
        ),
    ]  # fmt: skip
    if not request.data_path:
        inputs = ("--input", *map(str, request.data)) if request.data else ()
        words = ("data", "--out", str(out / "data"), "--tokenizer", f"{original}/huggingface", *inputs)
        found.insert(1, Stage("make the data set", words, out / "data", output="manifest.json", parallel=False))
    return found
