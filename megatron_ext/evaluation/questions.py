"""Tasks that a pruned model is judged by: questions with exact answers, and choices that are compared by likelihood.

A task is a function `(tokenizer, sequence_length, seed) -> Iterable[Question]`, named on the command line as
`package.module:function`. Greedy decoding gives a `Sample`'s answer token by token, or it is wrong; one forward pass
decides that, because each token of a right answer is the argmax after the right ones before it. Of a `MultipleChoice`
the most probable text is the model's answer, as in lm-evaluation-harness.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from megatron_ext.errors import ConfigError

METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Sample:
    """A question and its answer, or a text and how it goes on.

    Attributes:
        prompt: Token ids of the question, at least one.
        answer: Token ids of the answer, at least one.
    """

    prompt: Sequence[int]
    answer: Sequence[int]


@dataclass(frozen=True)
class MultipleChoice:
    """Texts of which one is right. They may differ in the answer, or, as in Winogrande, in what comes before it.

    Attributes:
        choices: The texts; of each, `answer` is scored.
        right: The number of the right one.
        lengths: What `acc_norm` divides the log-probability of each answer by, such as its characters; by default its
            tokens.
    """

    choices: Sequence[Sample]
    right: int
    lengths: Sequence[float] | None = None


Question = Sample | MultipleChoice
Task = Callable[[Any, int, int], Iterable[Question]]


def load_task(name: str) -> Task:
    """The task `package.module:function`.

    Raises:
        ConfigError: There is no such function.
    """
    module, _, function = name.partition(":")
    try:
        task: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the task cannot be loaded: {error}", got=name, legal="package.module:function, or lm_eval:NAME"
        ) from error
    if not callable(task):
        raise ConfigError("the task is not a function", got=name, legal="package.module:function, or lm_eval:NAME")
    return cast(Task, task)


def texts(questions: Sequence[Question], length: int) -> list[Sample]:
    """All texts of which a part is scored, question after question.

    Args:
        questions: The task.
        length: Tokens that the model reads at most.

    Raises:
        ConfigError: There is no question, a text does not fit, or a question has fewer than two choices, or no right
            one among them.
    """
    found = []
    if not questions:
        raise ConfigError("the task has no questions", legal="at least one")
    for number, question in enumerate(questions):
        own = list(question.choices) if isinstance(question, MultipleChoice) else [question]
        if isinstance(question, MultipleChoice):
            counts = (len(own), question.right, len(question.lengths or own))
            if len(own) < 2 or not 0 <= question.right < len(own) or counts[2] != len(own):
                raise ConfigError(
                    f"question {number} of the task is none of a choice",
                    got="{} choices, number {} is right, {} lengths".format(*counts),
                    legal="two choices or more, one of them right, and a length for each",
                )
        for text in own:
            before, after = len(text.prompt), len(text.answer)
            if not before or not after or before + after - 1 > length:
                raise ConfigError(
                    f"question {number} of the task does not fit", got=f"{before} + {after} tokens",
                    legal=f"a prompt and an answer, {length + 1} tokens at most",
                )  # fmt: skip
            found.append(text)
    return found


def accuracy(questions: Sequence[Question], scores: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The share of questions that are answered right, by metric of `METRICS`.

    `acc` takes the most probable choice, `acc_norm` the one of the highest log-probability by length; a `Sample` is
    right in both if its answer is greedy. Of equal choices the first counts.

    Args:
        questions: The task.
        scores: For each of its `texts`, the answer's log-probability in nats, and whether greedy decoding gives it.
    """
    right = dict.fromkeys(METRICS, 0)
    rest = iter(scores)
    for question in questions:
        if isinstance(question, Sample):
            _, greedy = next(rest)
            marks = dict.fromkeys(METRICS, greedy)
        else:
            totals = [next(rest)[0] for _ in question.choices]
            lengths = question.lengths or [len(choice.answer) for choice in question.choices]
            normed = [total / length for total, length in zip(totals, lengths, strict=True)]
            best = totals.index(max(totals)), normed.index(max(normed))
            marks = dict(zip(METRICS, (place == question.right for place in best), strict=True))
        right = {metric: right[metric] + marks[metric] for metric in METRICS}
    return {metric: count / len(questions) for metric, count in right.items()}
