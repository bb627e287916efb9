"""What no single place of a text says: chains of assignments, and which words are frequent."""

from random import Random

from megatron_ext.evaluation.synthetic import words
from megatron_ext.evaluation.synthetic.suite import TextSuite

RULER = "RULER, arXiv 2404.06654"
HOPS = 4
COMMON = 3


def _variable_tracking(rng: Random, size: int) -> tuple[str, str]:
    """A value is handed on from variable to variable; between that another value, and noise."""
    variables = words.different(rng, 2 * (HOPS + 1))
    chains, values = (variables[: HOPS + 1], variables[HOPS + 1 :]), [words.number(rng) for _ in range(2)]
    assignments = [
        [f"Let {left} = {right}." for left, right in zip(chain, [value, *chain[:-1]], strict=True)]
        for chain, value in zip(chains, values, strict=True)
    ]
    turns = [0] * (HOPS + 1) + [1] * (HOPS + 1)
    rng.shuffle(turns)
    rest = [iter(own) for own in assignments]
    text = words.hidden(rng, size, [next(rest[turn]) for turn in turns])
    question = f"which variables have the value {values[0]}, in the order of the text?"
    return f"{text}\nQuestion: {question}\nAnswer: they are", f" {', '.join(chains[0])}"


def _common_words(rng: Random, size: int) -> tuple[str, str]:
    """Some words are frequent, each in a number of its own, and the others appear once or twice."""
    vocabulary = words.different(rng, COMMON + size)
    common, rest = vocabulary[:COMMON], vocabulary[COMMON:]
    step = max(1, size // 12)
    text = [word for rank, word in enumerate(common) for _ in range(2 + step * (COMMON - rank))]
    text += [word for word in rest for _ in range(rng.randrange(1, 3))]
    rng.shuffle(text)
    question = f"which {COMMON} words are the most frequent, the most frequent first?"
    return f"Words: {' '.join(text)}\nQuestion: {question}\nAnswer: they are", f" {', '.join(common)}"


variable_tracking = TextSuite("variable_tracking", RULER, _variable_tracking)
common_words = TextSuite("common_words", RULER, _common_words)
