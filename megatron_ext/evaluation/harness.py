"""lm-evaluation-harness on a Megatron checkpoint: its own tasks and metrics, our forward passes, on any layout.

To the harness each rank is a world of its own that asks the whole model everything, in the same order; how the
questions are shared is decided below its interface. So all ranks call `run_tasks` alike, and all get the results.
"""

import contextlib
import difflib
import io
import logging
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from megatron_ext.errors import ConfigError, DataError
from megatron_ext.evaluation.answers import Answers
from megatron_ext.evaluation.perplexity import Window
from megatron_ext.inference.generate import generate
from megatron_ext.inference.passage import Passage, Score
from megatron_ext.inference.progress import progress
from megatron_ext.inference.prompts import Writer, document_start
from megatron_ext.inference.request import Request
from megatron_ext.inference.sampling import Sampling
from megatron_ext.inference.score import score
from megatron_ext.inference.sharded import ShardedModel

SEED = 1234  # the harness's own
BOOTSTRAP = 1000  # for the error of metrics that are no means
NEW_TOKENS = 256  # where a task does not say; as for the harness's own models


@dataclass(frozen=True)
class Limits:
    """How much at once.

    Attributes:
        length: Tokens that the model reads at most: longer contexts lose their beginning.
        batch_tokens: Tokens that are scored at once.
        batch_size: Prompts that are continued at once.
    """

    length: int
    batch_tokens: int = 8192
    batch_size: int = 8


class MegatronLM(TemplateLM):
    """The harness's interface to a model.

    Args:
        model: The model.
        writer: Its tokenizer, and the tokens that end a continuation.
        limits: How much at once.
        answers: Where answers are kept; without it nothing is.
    """

    def __init__(self, model: ShardedModel, writer: Writer, limits: Limits, answers: Answers | None = None) -> None:
        super().__init__()
        self.model, self.writer, self.limits, self.answers = model, writer, limits, answers
        self.tokenizer = writer.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token between documents."""
        end = self.tokenizer.eos_token_id
        return self.prefix_token_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The token that text without a context begins after."""
        return document_start(self.tokenizer)

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self.limits.length

    @property
    def tokenizer_name(self) -> str:
        """Names what the harness caches of chat templates."""
        return self.tokenizer.name_or_path.replace(os.sep, "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's template has it."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with what the tokenizer puts around a text, unless that is there or is not wanted."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begin is not None and string.startswith(begin))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        passages = []
        for (context, continuation), before, after in requests:
            if len(after) > self.limits.length:
                raise ConfigError(
                    "a continuation of the task is longer than the model reads", got=f"{len(after)} tokens",
                    legal=f"{self.limits.length} tokens",
                )  # fmt: skip
            assert before, (context, continuation)
            tokens = [*before, *after][-(self.limits.length + 1) :]
            passages.append([Passage(tokens, len(tokens) - len(after))])
        questions = [("loglikelihood", before, after, self.limits.length) for _, before, after in requests]
        return [(total, greedy) for total, greedy in self._scored(questions, passages)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the model's length."""
        window = Window(self.limits.length, self.limits.length)
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        passages = [window.passages([self.prefix_token_id, *text]) for text in texts]
        questions = [("rolling", text, self.limits.length) for text in texts]
        return [total for total, _ in self._scored(questions, passages)]

    def _scored(
        self, questions: Sequence[tuple[Any, ...]], passages: Sequence[list[Passage]]
    ) -> list[tuple[float, bool]]:
        """For each question the log-probability of its passages, and whether all of them are greedy."""
        found = self._known(questions)
        flat = [(i, passage) for i, answer in enumerate(found) if answer is None for passage in passages[i]]
        parts: dict[int, list[Score]] = {}
        with progress("scoring", len(flat)) as advance:
            for number, result in score(self.model, [passage for _, passage in flat], self.limits.batch_tokens):
                i = flat[number][0]
                own = parts.setdefault(i, [])
                own.append(result)
                if len(own) == len(passages[i]):
                    found[i] = [sum(part.total for part in own), all(part.all_greedy for part in own)]
                    self._learn(questions[i], found[i])
                advance()
        return [(0.0, True) if answer is None else tuple(answer) for answer in found]  # an empty text has no passage

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, up to a stop text."""
        asked = [self._request(*request.args) for request in requests]
        questions = [
            ("generate", list(request.prompt), request.max_new_tokens, list(writer.stops), str(sampling))
            for request, writer, sampling in asked
        ]
        # What is drawn is drawn again: a task that asks twice wants two answers.
        kept = [sampling.temperature == 0 for _, _, sampling in asked]
        known = self._known(questions)
        found: list[Any] = [answer if keep else None for answer, keep in zip(known, kept, strict=True)]
        groups: dict[Sampling, list[int]] = {}
        for i, (_, _, sampling) in enumerate(asked):
            if found[i] is None:
                groups.setdefault(sampling, []).append(i)
        with progress("generating", sum(map(len, groups.values()))) as advance:
            for sampling, own in groups.items():
                made = generate(self.model, [asked[i][0] for i in own], sampling, self.limits.batch_size)
                for number, new in made:
                    i = own[number]
                    found[i] = asked[i][1].text(asked[i][0].prompt, new)
                    if kept[i]:
                        self._learn(questions[i], found[i])
                    advance()
        return found

    def _request(self, context: str, settings: dict[str, Any]) -> tuple[Request, Writer, Sampling]:
        values: dict[str, Any] = {**normalize_gen_kwargs(settings, NEW_TOKENS)}
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stops = [stop for stop in handle_stop_sequences(values.get("until"), end) if stop]
        new = values["max_gen_toks"]
        room = self.limits.length - new
        if room < 1:
            raise ConfigError(
                "a task asks for more new tokens than the model reads", got=f"{new} tokens",
                legal=f"less than {self.limits.length}",
            )  # fmt: skip
        writer = Writer(self.tokenizer, self.writer.ends, stops)
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        # top_k of transformers is 50 by default, and this harness's tasks are written for that.
        drawn = values["temperature"] > 0
        sampling = Sampling(
            float(values["temperature"]), int(values.get("top_k", 50)) if drawn else 0,
            float(values.get("top_p", 1.0)) if drawn else 1.0,
        )  # fmt: skip
        return writer.request(prompt[-room:], new), writer, sampling

    def _known(self, questions: Sequence[tuple[Any, ...]]) -> list[Any]:
        if self.answers is None:
            return [None] * len(questions)
        return [self.answers[question] for question in questions]

    def _learn(self, question: tuple[Any, ...], answer: Any) -> None:
        if self.answers is not None:
            self.answers[question] = answer


@dataclass(frozen=True)
class Tasks:
    """What the harness is to run.

    Attributes:
        names: Tasks or groups of tasks, as `lm_eval --tasks list` has them.
        folders: Where else task files lie.
        num_fewshot: Examples before each question; the task's own number by default.
    """

    names: Sequence[str]
    folders: Sequence[Path] = ()
    num_fewshot: int | None = None

    def load(self) -> Any:
        """The tasks with their data, which the harness may have to download.

        Raises:
            ConfigError: There is no task of a name.
            DataError: A task or its data cannot be loaded.
        """
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = self._manager()
        try:
            with _first_rank_speaks():
                loaded = manager.load(list(self.names))
        except Exception as error:  # whatever a task's own code or a download raises
            raise DataError(f"the harness cannot load the tasks: {error!r}", got=" ".join(self.names)) from error
        for task in loaded["tasks"].values():
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


def run_tasks(lm: MegatronLM, loaded: Any, limit: int | None = None) -> dict[str, dict[str, Any]]:
    """Run tasks; the metrics of each task and group by name, on every rank.

    Args:
        lm: The model.
        loaded: From `Tasks.load`.
        limit: Questions of each task; all by default.
    """
    from lm_eval.evaluator import evaluate

    random.seed(SEED)  # tasks may draw, and all ranks must draw alike
    numpy.random.seed(SEED)
    with _first_rank_speaks():
        found: Any = evaluate(lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
    return {name: _metrics(name, found) for name in found["results"]}


@contextlib.contextmanager
def _first_rank_speaks() -> Iterator[None]:
    """Without the progress bars that the harness would show on each rank, a world of its own."""
    if int(os.environ.get("RANK", "0")) == 0:
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def _metrics(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What is a number: the harness calls its metrics "acc,none", and those of another filter "exact_match,strict"."""
    metrics: dict[str, Any] = {}
    for key, value in found["results"][name].items():
        metric, _, filtered = key.partition(",")
        if filtered and isinstance(value, int | float) and math.isfinite(value):
            metrics[metric if filtered == "none" else f"{metric} ({filtered})"] = value
    if samples := found["n-samples"].get(name):
        metrics["samples"] = samples["effective"]
    for key, field in (("num_fewshot", "n-shot"), ("version", "versions")):
        if name in found[field]:
            metrics[key] = found[field][name]
    return metrics
