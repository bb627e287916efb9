"""What a suite is, and how its questions are made to fill a context."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from random import Random
from typing import Any

from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.questions import Sample

SAMPLES = 50
TRIES = 8


@dataclass(frozen=True)
class Suite(ABC):
    """Questions of one kind.

    Attributes:
        name: As on the command line.
        source: Where the task was described.
    """

    name: str
    source: str

    def __call__(self, tokenizer: Any, sequence_length: int, seed: int) -> list[Sample]:
        """`SAMPLES` questions; the signature of a pruning task."""
        return list(islice(self.samples(tokenizer, sequence_length, seed), SAMPLES))

    def samples(self, tokenizer: Any, length: int, seed: int) -> Iterator[Sample]:
        """Endless questions, each for itself: the first of them are the same however many are taken.

        Args:
            tokenizer: transformers' or Megatron's.
            length: Tokens of a question and its answer together; as many as fit are used.
            seed: Everything else is drawn from this.

        Raises:
            ConfigError: Not even the smallest question is that short.
        """
        words = Encoder(tokenizer)
        number = 0
        while True:
            yield self.sample(words, length, f"{self.name}/{seed}/{length}/{number}")
            number += 1

    @abstractmethod
    def sample(self, words: "Encoder", length: int, seed: str) -> Sample:
        """One question."""

    def _too_short(self, length: int, least: int) -> ConfigError:
        return ConfigError(
            f"{self.name} has no question so short", got=f"{length} tokens", legal=f"{least} tokens or more"
        )


class Encoder:
    """From text to tokens, with transformers' tokenizer or with Megatron's."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = len(tokenizer) if hasattr(tokenizer, "__len__") else int(tokenizer.vocab_size)

    def __call__(self, text: str) -> list[int]:
        """Of a whole text, with what the tokenizer puts before one."""
        if hasattr(self._tokenizer, "all_special_ids"):  # transformers'
            return self._tokenizer(text, verbose=False)["input_ids"]
        return list(self._tokenizer.tokenize(text))

    def continued(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """A prompt's tokens and those that an answer adds to them."""
        before, whole = self(prompt), self(prompt + answer)
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        bare = len(self(""))  # the end of the prompt is one word with the answer: then each for itself
        return before, self(answer)[bare:]

    @cached_property
    def ordinary(self) -> list[int]:
        """Tokens that are none of the special ones."""
        special = {*getattr(self._tokenizer, "all_special_ids", ()), getattr(self._tokenizer, "eod", None)}
        return [token for token in range(self._vocab_size) if token not in special]


@dataclass(frozen=True)
class TextSuite(Suite):
    """Questions that are text.

    Attributes:
        write: From a random generator and a size to question and answer; the longer, the larger the size. It draws the
            same for the same size.
        least: The smallest size.
    """

    write: Callable[[Random, int], tuple[str, str]]
    least: int = 1

    def sample(self, words: Encoder, length: int, seed: str) -> Sample:
        """The largest question that fits, or nearly so."""

        def written(size: int) -> tuple[list[int], list[int], int]:
            prompt, answer = words.continued(*self.write(Random(seed), size))
            return prompt, answer, len(prompt) + len(answer)

        size, smallest = self.least, written(self.least)
        if smallest[2] > length:
            raise self._too_short(length, smallest[2])
        # As many as fit at the rate of the last try, and less where that was too many; a few tries come near enough.
        best, too_large, rate = smallest, None, (written(size + 16)[2] - smallest[2]) / 16
        for _ in range(TRIES):
            guess = size + int((length - best[2]) / rate)
            if too_large is not None:
                guess = min(guess, too_large - 1)
            if guess <= size:
                break
            found = written(guess)
            rate = (found[2] - smallest[2]) / (guess - self.least)
            if found[2] > length:
                too_large = guess
            else:
                size, best = guess, found
        return Sample(best[0], best[1])
