"""Tasks of lm-evaluation-harness (`--tasks`), each kept when it is done."""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpoint.ranks import rank
from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.measure import Evaluation, Measure, MeasureKind, Panel
from megatron_ext.evaluation.measured_run import Run
from megatron_ext.evaluation.request_cache import RequestCache
from megatron_ext.evaluation.rows import Row, Unequal, differences, note, shown
from megatron_ext.inference.chat import check_template
from megatron_ext.inference.prompts import TextCodec, stop_tokens
from megatron_ext.reports.results import SETTINGS

if TYPE_CHECKING:
    from megatron_ext.inference.sharded import ShardedModel

FACTS = ("samples", "num_fewshot", "version", "requests", "cut", "samples_file", SETTINGS)  # beside the metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of tasks."""
    tasks = parser.add_argument_group("tasks", "lm-evaluation-harness; interrupted, it goes on where it stopped")
    tasks.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks or groups of the harness")
    folders = {"type": Path, "action": "append", "default": [], "metavar": "DIR"}
    tasks.add_argument("--task-folder", **folders, help="where else tasks are described")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples; by default the task's own number")
    tasks.add_argument("--limit", type=int, metavar="N", help="questions of each task; by default all")
    tasks.add_argument("--chat", action="store_true", help="questions in the tokenizer's chat template")
    tasks.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    turns = "with --chat: each example a turn of its own (the default), or all in one question"
    tasks.add_argument("--fewshot-as-multiturn", action=argparse.BooleanOptionalAction, default=True, help=turns)
    settings = "of generation, instead of the tasks' own: temperature=0.7 top_p=0.9 max_gen_toks=64 ..."
    tasks.add_argument("--gen-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help=settings)
    tasks.add_argument("--log-samples", action="store_true", help="write each question and its answer to samples/")


def asked(args: argparse.Namespace) -> bool:
    """Whether there are tasks.

    Raises:
        ConfigError: There are none, but flags for them.
    """
    if args.tasks:
        return True
    names = ("task_folder", "num_fewshot", "limit", "chat", "system", "gen_kwargs", "log_samples")
    given = [name for name in names if getattr(args, name) not in (None, False, [])]
    if given or not args.fewshot_as_multiturn:
        flag = given[0] if given else "no_fewshot_as_multiturn"
        raise ConfigError(f"--{flag.replace('_', '-')} is for tasks", legal="with --tasks NAME")
    return False


class TaskMeasure(Measure):
    """The tasks that a command line asks for, checked and loaded.

    Raises:
        ConfigError: The harness is not installed, has no such task, or cannot ask one so.
        DataError: A task or its data cannot be loaded.
    """

    name = "tasks"

    def __init__(self, evaluation: Evaluation) -> None:
        args, tokenizer = evaluation.args, evaluation.tokenizer
        length = args.window or evaluation.longest
        try:
            from megatron_ext.evaluation import generation, harness
            from megatron_ext.evaluation.tasks import Chat, Tasks
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"lm-evaluation-harness is not installed: {error}", legal="pip install 'megatron-ext[eval]'"
            ) from error
        for name, least in (("limit", 1), ("num_fewshot", 0)):
            if (value := getattr(args, name)) is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')}", got=value, legal=f"{least} or more")
        if args.chat:
            check_template(tokenizer)
        elif args.system is not None or not args.fewshot_as_multiturn:
            raise ConfigError("--system and --no-fewshot-as-multiturn are for conversations", legal="with --chat")
        chat = Chat(args.system, args.fewshot_as_multiturn) if args.chat else None
        given = generation.parse(args.gen_kwargs)
        self._tasks = Tasks(args.tasks, args.task_folder, args.num_fewshot, args.limit, chat, given)
        self._loaded = self._tasks.load()
        self._limits = harness.Limits(length, args.batch_tokens, args.batch_size)
        self._writer = TextCodec(tokenizer, stop_tokens(args.checkpoint, tokenizer))
        self._results, self._log_samples = evaluation.results, args.log_samples
        conversation = {"system": args.system, "fewshot_as_multiturn": args.fewshot_as_multiturn} if args.chat else None
        self._settings = {
            **evaluation.settings,
            "window": length,
            "limit": args.limit,
            "chat": conversation,
            "generation": given,
        }

    def __call__(self, model: "ShardedModel") -> Iterator[dict[str, Any]]:
        """Run them; each as it is done."""
        from megatron_ext.evaluation.harness import MegatronLM

        kept = self._results.directory / "answers.jsonl"
        answers = RequestCache(kept, {**self._results.about, "dtype": self._settings["dtype"]})
        lm = MegatronLM(model, self._writer, self._limits, answers)
        for name, found, samples in self._tasks.run(lm, self._loaded, self._log_samples):
            found[SETTINGS] = {**self._settings, "num_fewshot": found.get("num_fewshot")}
            if rank() == 0:
                self._warn(name, found)
                if samples:
                    found["samples_file"] = self._write(name, found[SETTINGS], samples)
            yield {name: found}
        if rank() == 0 and answers.found:
            print(f"{answers.found:,} answers were there already, in {kept}", flush=True)

    def _warn(self, name: str, found: dict[str, Any]) -> None:
        if found.get("cut"):
            print(
                f"warning: {name}: {found['cut']:,} of {found['requests']:,} requests are longer than the window of "
                f"{self._limits.length:,} tokens and lost their beginning (--window N reads more)",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def _write(self, name: str, settings: dict[str, Any], samples: Any) -> str:
        """Write a task's samples to a file of their own for each step and way of asking."""
        from megatron_ext.evaluation.tasks import write_samples

        way = hashlib.sha256(json.dumps([self._results.about, settings], sort_keys=True).encode()).hexdigest()[:8]
        file = Path("samples") / f"{name.replace('/', '_')}-{way}.jsonl"
        write_samples(self._results.directory / file, samples)
        return str(file)

    def say(self, found: dict[str, Any]) -> str:
        """What was measured of some tasks, for people."""
        lines = []
        for name, metrics in found.items():
            for metric, value in metrics.items():
                if metric in FACTS or "_stderr" in metric:
                    continue
                base, space, filtered = metric.partition(" ")
                error = metrics.get(f"{base}_stderr{space}{filtered}")
                lines.append(f"{name}: {metric} {value:.4f}" + (f" +- {error:.4f}" if error is not None else ""))
        return "\n".join(lines)


def rows(runs: Sequence[Run]) -> list[Row]:
    """Each metric of each task."""
    found: dict[tuple[str, str], None] = {}
    for run in runs:
        for task, metrics in run.results.get("tasks", {}).items():
            for metric in metrics:
                if metric not in FACTS and "_stderr" not in metric:
                    found[task, metric] = None
    unequal = {task: task_differences(runs, task) for task, _ in found}
    return [
        Row(f"{task}: {metric}", shown(task_results(runs, task), metric, "{:.4f}"), unequal[task])
        for task, metric in found
    ]


def task_results(runs: Sequence[Run], task: str) -> list[dict[str, Any]]:
    """What each run has of a task; an empty object where it was not measured."""
    return [run.results.get("tasks", {}).get(task, {}) for run in runs]


def task_differences(runs: Sequence[Run], task: str) -> Unequal:
    """In what a task was asked differently. A window that no request was longer than made no difference."""
    results = task_results(runs, task)
    names = ["num_fewshot", "limit", "chat", "generation", "dtype", "tokenizer"]
    if any(result.get("cut", 1) for result in results if result):
        names.append("window")
    return differences(results, names)


def panels(runs: Sequence[Run]) -> list[Panel]:
    """A bar for each task and run."""
    return [("tasks", _draw)] if any(run.results.get("tasks") for run in runs) else []


def _draw(ax: Any, runs: Sequence[Run]) -> None:
    """Of each task one metric that all have: the first that is a share."""
    from matplotlib.ticker import PercentFormatter

    from megatron_ext.evaluation.panels import PALETTE

    names = list(dict.fromkeys(task for run in runs for task in run.results.get("tasks", {})))
    shown: list[tuple[str, str]] = []
    for task in names:
        own = [found for found in task_results(runs, task) if found]
        shares = ("acc_norm", "acc", "exact_match", "f1")
        metric = next((m for m in shares if all(m in metrics for metrics in own)), None)
        if metric is not None:
            shown.append((task, metric))
    height = 0.8 / len(runs)
    for number in range(len(runs)):
        values = [task_results(runs, task)[number].get(metric) or 0.0 for task, metric in shown]
        places = [place + (number - (len(runs) - 1) / 2) * height for place in range(len(shown))]
        ax.barh(places, values, height=0.9 * height, color=PALETTE[number % len(PALETTE)])
    labels = [f"{task}\n{metric}{note(task_differences(runs, task), values=False)}" for task, metric in shown]
    ax.set_yticks(range(len(shown)), labels)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))


KIND = MeasureKind(add_arguments, asked, TaskMeasure, rows, panels)
