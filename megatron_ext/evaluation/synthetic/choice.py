"""Suites as choices: which of several answers is the most probable after a question?

A model that never gives a whole answer token by token may still tell the right one from others; how often is a finer
measure of what a small or a pruned model has left. Chance is one in `choices`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.questions import MultipleChoice, Sample
from megatron_ext.evaluation.synthetic.suite import Suite

QUESTIONS = 100
TRIES = 100


@dataclass(frozen=True)
class Choices:
    """A suite's questions, each with its own answer and those of other questions, which are as long.

    Attributes:
        suite: Where questions and answers come from.
        choices: Answers to each question.
    """

    suite: Suite
    choices: int = 2

    def __call__(self, tokenizer: Any, sequence_length: int, seed: int) -> list[MultipleChoice]:
        """`QUESTIONS` questions; the signature of a pruning task.

        Raises:
            ConfigError: Not even the smallest question is as short as `sequence_length`, or all have the same answer.
        """
        others = self.suite.samples(tokenizer, sequence_length, seed + 1)
        draw = Random(f"{self.suite.name}/{seed}")
        asked = islice(self.suite.samples(tokenizer, sequence_length, seed), QUESTIONS)
        return [self._question(sample, others, draw) for sample in asked]

    def _question(self, sample: Sample, others: Iterator[Sample], draw: Random) -> MultipleChoice:
        answers = [tuple(sample.answer)]
        for other in islice(others, TRIES):
            if len(answers) == self.choices:
                break
            answer = tuple(other.answer)
            if answer not in answers and len(answer) == len(answers[0]):
                answers.append(answer)
        if len(answers) < self.choices:
            raise ConfigError(
                f"{self.suite.name} has too few answers of one length", got=len(answers), legal=self.choices
            )
        draw.shuffle(answers)
        right = answers.index(tuple(sample.answer))
        return MultipleChoice([Sample(sample.prompt, answer) for answer in answers], right)
