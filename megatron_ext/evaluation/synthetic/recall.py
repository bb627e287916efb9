"""Recall without words: sequences of random tokens, straight from the vocabulary."""

from dataclasses import dataclass
from random import Random

from megatron_ext.evaluation.questions import Sample
from megatron_ext.evaluation.synthetic.suite import Encoder, Suite


@dataclass(frozen=True)
class Copying(Suite):
    """A random sequence, once and again: each of its tokens but the first is to be given the second time."""

    def sample(self, words: Encoder, length: int, seed: str) -> Sample:
        """Of a sequence as long as half the context."""
        half = length // 2
        if half < 2:
            raise self._too_short(length, 4)
        rng = Random(seed)
        sequence = rng.choices(words.ordinary, k=half)
        # Its first token stands nowhere else in it, so that it says where the copy is to begin.
        rest = [token for token in words.ordinary if token != sequence[0]]
        sequence[1:] = [token if token != sequence[0] else rng.choice(rest) for token in sequence[1:]]
        return Sample([*sequence, sequence[0]], sequence[1:])


@dataclass(frozen=True)
class Induction(Suite):
    """One token stands twice among others, the second time at the end: what followed it the first time comes next."""

    def sample(self, words: Encoder, length: int, seed: str) -> Sample:
        """With its first place anywhere."""
        if length < 4:
            raise self._too_short(length, 4)
        rng = Random(seed)
        trigger = rng.choice(words.ordinary)
        others = [token for token in words.ordinary if token != trigger]
        sequence = rng.choices(others, k=length - 2)
        place = rng.randrange(len(sequence) - 1)
        sequence[place] = trigger
        return Sample([*sequence, trigger], [sequence[place + 1]])


copying = Copying("copying", "Repeat After Me, arXiv 2402.01032")
induction = Induction("induction", "Mamba, arXiv 2312.00752, section 4.1.2")
