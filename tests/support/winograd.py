"""A task of random tokens for pruning: choices that differ in their beginnings or their ends, and exact answers."""

from random import Random
from typing import Any

from megatron_ext.evaluation.questions import MultipleChoice, Question, Sample

WORDS = 500


def questions(tokenizer: Any, length: int, seed: int) -> list[Question]:
    """Of each kind twenty, in turns; lengths that no token count gives."""
    draw = Random(7)

    def some(low: int, high: int) -> list[int]:
        return draw.choices(range(WORDS), k=draw.randint(low, high))

    found: list[Question] = []
    for number in range(20):
        answer, prompt = some(1, 3), some(2, 9)
        found.append(MultipleChoice([Sample(some(2, 9), answer) for _ in range(2)], number % 2))
        choices = [Sample(prompt, some(1, 4)) for _ in range(3)]
        found.append(MultipleChoice(choices, number % 3, [draw.uniform(1, 9) for _ in choices]))
        found.append(Sample(prompt, answer[:1]))
    return found
