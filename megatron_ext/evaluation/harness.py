"""lm-evaluation-harness on a Megatron checkpoint: its own tasks and metrics, our forward passes, on any layout.

To the harness each rank is a world of its own that asks the whole model everything, in the same order; how the
questions are shared is decided below its interface. So all ranks ask alike, and all get the answers.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences

from megatron_ext.errors import ConfigError
from megatron_ext.evaluation import generation
from megatron_ext.evaluation.perplexity import Window
from megatron_ext.evaluation.request_cache import RequestCache
from megatron_ext.inference.chat import render
from megatron_ext.inference.generate import generate
from megatron_ext.inference.loglikelihood import Loglikelihood, LoglikelihoodRequest
from megatron_ext.inference.prompts import TextCodec, document_start
from megatron_ext.inference.request import Request
from megatron_ext.inference.sampling import Sampling
from megatron_ext.inference.score import score
from megatron_ext.inference.sharded import ShardedModel
from megatron_ext.reports.progress import Progress


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

    def __init__(
        self, model: ShardedModel, writer: TextCodec, limits: Limits, answers: RequestCache | None = None
    ) -> None:
        super().__init__()
        self.model, self.writer, self.limits, self.answers = model, writer, limits, answers
        self.tokenizer = writer.tokenizer
        self.begin("")

    def begin(self, task: str) -> None:
        """What is asked from now on is of this task."""
        self._task, self._requests, self._cut = task, 0, 0

    def lengths(self) -> dict[str, int]:
        """Of the requests of a task: how many they are, and how many lost their beginning to `Limits.length`."""
        return {"requests": self._requests, "cut": self._cut}

    def _count(self, tokens: int, room: int) -> None:
        self._requests += 1
        self._cut += tokens > room

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
        return render(self.tokenizer, chat_history, add_generation_prompt)

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
                    "a continuation of the task is longer than the model reads",
                    got=f"{self._task}: {len(after)} tokens",
                    legal=f"{self.limits.length} tokens, or a larger --window",
                )  # fmt: skip
            assert before, (context, continuation)
            self._count(len(before) + len(after), self.limits.length + 1)
            tokens = [*before, *after][-(self.limits.length + 1) :]
            passages.append([LoglikelihoodRequest(tokens, len(tokens) - len(after))])
        questions = [("loglikelihood", before, after, self.limits.length) for _, before, after in requests]
        return [(total, greedy) for total, greedy in self._scored(questions, passages)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the model's length."""
        window = Window(self.limits.length, self.limits.length)
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        self._requests += len(texts)
        passages = [window.passages([self.prefix_token_id, *text]) for text in texts]
        questions = [("rolling", text, self.limits.length) for text in texts]
        return [total for total, _ in self._scored(questions, passages)]

    def _scored(
        self, questions: Sequence[tuple[Any, ...]], passages: Sequence[list[LoglikelihoodRequest]]
    ) -> list[tuple[float, bool]]:
        """For each question the log-probability of its passages, and whether all of them are greedy."""
        found = self._known(questions)
        flat = [(i, passage) for i, answer in enumerate(found) if answer is None for passage in passages[i]]
        parts: dict[int, list[Loglikelihood]] = {}
        with Progress(f"{self._task}: scoring", len(flat)) as shown:
            for number, result in score(self.model, [passage for _, passage in flat], self.limits.batch_tokens):
                i = flat[number][0]
                own = parts.setdefault(i, [])
                own.append(result)
                if len(own) == len(passages[i]):
                    found[i] = [sum(part.total for part in own), all(part.all_greedy for part in own)]
                    self._learn(questions[i], found[i])
                shown.advance()
        return [(0.0, True) if answer is None else tuple(answer) for answer in found]  # an empty text has no passage

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, up to a stop text."""
        asked = [self._request(*request.args) for request in requests]
        questions = [
            ("continue", list(request.prompt), request.max_new_tokens, list(writer.stops), str(sampling))
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
        with Progress(f"{self._task}: generating", sum(map(len, groups.values()))) as shown:
            for sampling, own in groups.items():
                made = generate(self.model, [asked[i][0] for i in own], sampling, self.limits.batch_size)
                for number, new in made:
                    i = own[number]
                    found[i] = asked[i][1].text(asked[i][0].prompt, new)
                    if kept[i]:
                        self._learn(questions[i], found[i])
                    shown.advance()
        return found

    def _request(self, context: str, settings: dict[str, Any]) -> tuple[Request, TextCodec, Sampling]:
        values = generation.normalized(settings)
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stops = [stop for stop in handle_stop_sequences(values["until"], end) if stop]
        new = values["max_gen_toks"]
        room = self.limits.length - new
        if room < 1:
            raise ConfigError(
                "a task asks for more new tokens than the model reads", got=f"{self._task}: {new} tokens",
                legal=f"less than {self.limits.length}: --gen-kwargs max_gen_toks=N, or a larger --window",
            )  # fmt: skip
        writer = TextCodec(self.tokenizer, self.writer.ends, stops)
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        self._count(len(prompt), room)
        return writer.request(prompt[-room:], new), writer, generation.sampling(settings)

    def _known(self, questions: Sequence[tuple[Any, ...]]) -> list[Any]:
        if self.answers is None:
            return [None] * len(questions)
        return [self.answers[question] for question in questions]

    def _learn(self, question: tuple[Any, ...], answer: Any) -> None:
        if self.answers is not None:
            self.answers[question] = answer
