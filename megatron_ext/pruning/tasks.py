"""Tasks that a pruned model is judged by: questions whose answers are exact.

A task is a function `(tokenizer, sequence_length, seed) -> Iterable[Sample]`, named on the command line as
`package.module:function`. A sample is answered right if the model, decoding greedily, gives its answer token by token;
one forward pass decides that, because each token of a right answer is the argmax after the right ones before it.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class Sample:
    """A question and its answer.

    Attributes:
        prompt: Token ids of the question, at least one.
        answer: Token ids of the answer, at least one.
    """

    prompt: Sequence[int]
    answer: Sequence[int]


Task = Callable[[Any, int, int], Iterable[Sample]]


def load_task(name: str) -> Task:
    """The task `package.module:function`.

    Raises:
        ConfigError: There is no such function.
    """
    module, _, function = name.partition(":")
    try:
        task: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"the task cannot be loaded: {error}", got=name, legal="package.module:function") from error
    if not callable(task):
        raise ConfigError("the task is not a function", got=name, legal="package.module:function")
    return cast(Task, task)


def batches(samples: Sequence[Sample], length: int, size: int) -> list[dict[str, Tensor]]:
    """Micro-batches of `size` samples: `tokens`, `labels`, `loss_mask`, `position_ids`, each (size, length).

    Labels are -1 where nothing is to be answered, all along for the samples that fill the last batch.

    Raises:
        ConfigError: A sample is longer than `length` tokens, or has no prompt or no answer.
    """
    count = -(-len(samples) // size) * size
    tokens = torch.zeros(count, length, dtype=torch.int64)
    labels = torch.full((count, length), -1, dtype=torch.int64)
    for row, sample in enumerate(samples):
        text = [*sample.prompt, *sample.answer]
        if not sample.prompt or not sample.answer or len(text) - 1 > length:
            raise ConfigError(
                f"sample {row} of the task does not fit", got=f"{len(sample.prompt)} + {len(sample.answer)} tokens",
                legal=f"a prompt and an answer, {length + 1} tokens at most",
            )  # fmt: skip
        tokens[row, : len(text) - 1] = torch.tensor(text[:-1])
        labels[row, len(sample.prompt) - 1 : len(text) - 1] = torch.tensor(sample.answer)
    positions = torch.arange(length).expand(count, length)
    whole = {"tokens": tokens, "labels": labels, "loss_mask": (labels >= 0).float(), "position_ids": positions}
    return [{name: value[i : i + size].contiguous() for name, value in whole.items()} for i in range(0, count, size)]
