"""Tasks of lm-evaluation-harness: loaded and checked before a model is, then run one after the other."""

import contextlib
import difflib
import io
import json
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from megatron_ext.checkpoint.atomic import atomic_write
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.evaluation.generation import check_settings
from megatron_ext.evaluation.harness import MegatronLM
from megatron_ext.inference.interrupt import stop_if_asked
from megatron_ext.reports.results import finite

SEED = 1234  # the harness's own
BOOTSTRAP = 1000  # for the error of metrics that are no means


@dataclass(frozen=True)
class Chat:
    """Questions as a conversation, in the words of the tokenizer's template.

    Attributes:
        system: What the conversation begins with.
        multiturn: Whether each example is a turn of its own; otherwise all are in the first question.
    """

    system: str | None = None
    multiturn: bool = True


@dataclass(frozen=True)
class Tasks:
    """What the harness is to run.

    Attributes:
        names: Tasks or groups of tasks, as `lm_eval --tasks list` has them.
        folders: Where else task files lie.
        num_fewshot: Examples before each question; the task's own number by default.
        limit: Questions of each task; all by default.
        chat: Questions as a conversation; plain text by default.
        generation: Settings of generation that take the place of the tasks' own.
    """

    names: Sequence[str]
    folders: Sequence[Path] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    chat: Chat | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """The tasks with their data, which the harness may have to download.

        Raises:
            ConfigError: There is no task of a name, or one cannot be asked so.
            DataError: A task or its data cannot be loaded.
        """
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = self._manager()
        try:
            with _first_rank_prints():
                loaded = manager.load(list(self.names))
        except Exception as error:  # whatever a task's own code or a download raises
            raise DataError(f"the harness cannot load the tasks: {error!r}", got=" ".join(self.names)) from error
        generating = [task for task in loaded["tasks"].values() if task.get_config("output_type") == "generate_until"]
        if self.generation and not generating:
            raise ConfigError("none of the tasks generates", got="--gen-kwargs", legal="tasks of type generate_until")
        for task in generating:
            task.set_config(key="generation_kwargs", value=dict(self.generation), update=True)
            check_settings(task.get_config("generation_kwargs"), task.config.task)
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError("a task runs code that the model wrote, which is not done here", got=name)
            # A task that says 0 itself cannot be asked with examples.
            own = task.get_config("num_fewshot")
            if own is None or (own != 0 and self.num_fewshot is not None):
                task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
            task.set_fewshot_seed(seed=SEED)
        return loaded

    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        for folder in self.folders:
            if not folder.is_dir():
                raise ConfigError("no such folder of tasks", got=folder)
        where: Any = [str(folder) for folder in self.folders] or None
        if where:  # the harness's own are thousands of files to look through
            manager = TaskManager(include_path=where, include_defaults=False)
            if all(manager.match_tasks([name]) for name in self.names):
                return manager
        manager = TaskManager(include_path=where)
        for name in self.names:
            if not manager.match_tasks([name]):
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                raise ConfigError("the harness has no such task", got=name, legal=", ".join(near) or "lm_eval ls tasks")
        return manager

    def run(
        self, lm: MegatronLM, loaded: Any, samples: bool = False
    ) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
        """Run the tasks one after the other, so that each is done when it is done.

        Args:
            lm: The model.
            loaded: From `load`.
            samples: Whether to keep what each question was and what came of it.

        Yields:
            A task's or group's name, its metrics, and its samples as the harness logs them; on every rank. Groups come
            after their tasks.

        Raises:
            Interrupted: A rank was asked to stop.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.evaluator_utils import EvalAcc, aggregate_groups

        scores: dict[str, Any] = {}
        for name, task in loaded["tasks"].items():
            stop_if_asked()
            random.seed(SEED)  # tasks may draw, and all ranks must draw alike
            numpy.random.seed(SEED)
            lm.begin(name)
            chat = self.chat or Chat(multiturn=False)
            with _first_rank_prints():
                found: Any = evaluate(
                    lm, {"tasks": {name: task}, "groups": {}, "group_map": {}}, limit=self.limit,
                    bootstrap_iters=BOOTSTRAP, log_samples=samples, apply_chat_template=self.chat is not None,
                    system_instruction=chat.system, fewshot_as_multiturn=chat.multiturn,
                )  # fmt: skip
            scores[name] = found["results"][name]
            facts = {"samples": found["n-samples"][name]["effective"], "num_fewshot": found["n-shot"].get(name)}
            facts |= {"version": found["versions"].get(name), **lm.lengths()}
            yield name, {**_metrics(scores[name]), **facts}, found.get("samples", {}).get(name, [])
        groups = aggregate_groups(EvalAcc(metrics=dict(scores), groups=loaded["groups"]))
        for name in loaded["groups"]:
            if metrics := _metrics(groups.metrics.get(name, {})):
                own = {task.get_config("num_fewshot") for task in loaded["groups"][name].get_all_tasks()}
                yield name, {**metrics, "num_fewshot": own.pop() if len(own) == 1 else None}, []


@contextlib.contextmanager
def _first_rank_prints() -> Iterator[None]:
    """Without the progress bars that the harness would show on each rank, a world of its own.

    Standard output belongs to what is measured.
    """
    is_first = int(os.environ.get("RANK", "0")) == 0
    with contextlib.ExitStack() as stack:
        if not is_first:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _metrics(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is a number: the harness calls its metrics "acc,none", and those of another filter "exact_match,strict"."""
    metrics: dict[str, Any] = {}
    for key, value in found.items():
        metric, _, filtered = key.partition(",")
        if filtered and isinstance(value, int | float) and math.isfinite(value):
            metrics[metric if filtered == "none" else f"{metric} ({filtered})"] = value
    return metrics


def write_samples(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write what each question was and what came of it, one JSON object on each line.

    Args:
        path: The file, which appears whole.
        samples: As the harness logs them; each has a line for each filter of the task.
    """
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for sample in samples:
            row = {
                "id": sample["doc_id"],
                "prompt": sample["arguments"][0][0],
                "target": sample["target"],
                # Of multiple choice an output for each choice: its log-probability, and whether it is greedy.
                "requests": [list(arguments) for arguments in sample["arguments"]],
                "outputs": sample["resps"],
                "filtered": sample["filtered_resps"],
                "filter": sample["filter"],
                "scores": {metric: sample[metric] for metric in sample["metrics"]},
                "doc": sample["doc"],
            }
            file.write(json.dumps(finite(row), default=str) + "\n")
