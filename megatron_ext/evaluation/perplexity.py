"""How well a model predicts text: perplexity and bits per byte, in windows that slide over it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext.data.lines import JSONL_SUFFIXES, read_strings, read_text
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.inference.passage import Passage, Score
from megatron_ext.inference.prompts import document_start


@dataclass(frozen=True)
class Window:
    """Which part of a text a model sees at once.

    Attributes:
        size: Tokens that it reads, each of which it predicts the next of.
        stride: Tokens by which the window moves on; at least `size - stride` tokens are seen before each one that is
            predicted, but for the first `size`.

    Raises:
        ConfigError: Not 1 <= stride <= size.
    """

    size: int
    stride: int

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.size:
            raise ConfigError(
                "the window's stride", got=f"stride {self.stride}, window {self.size}", legal="1 to the window's size"
            )

    def passages(self, tokens: Sequence[int]) -> list[Passage]:
        """What is to be scored so that each token but the first is predicted once."""
        found, done = [], 1
        while done < len(tokens):
            stop = min(len(tokens), self.size + 1 if done == 1 else done + self.stride)
            start = max(0, stop - self.size - 1)
            found.append(Passage(tokens[start:stop], done - start))
            done = stop
        return found


@dataclass(frozen=True)
class Fit:
    """How well a text is predicted.

    Attributes:
        nats: The negative log-probability of all its tokens.
        tokens: How many they are.
        bytes: How long it is in UTF-8.
    """

    nats: float
    tokens: int
    bytes: int

    def __add__(self, other: "Fit") -> "Fit":
        return Fit(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    def to_dict(self) -> dict[str, float]:
        """With `loss` (nats per token), its exponential, and `bits_per_byte`, which no tokenizer has a part in."""
        loss = self.nats / self.tokens
        # Beyond the largest float is as bad as infinite, which is no JSON.
        perplexity = math.exp(loss) if loss < 700 else None
        more = {"loss": loss, "perplexity": perplexity, "bits_per_byte": self.nats / math.log(2) / self.bytes}
        return {**more, **asdict(self)}


def documents(file: Path) -> list[str]:
    """The exact texts of a file: of a JSON Lines file each line's "text", else all of it. Empty ones are left out.

    Raises:
        DataError: It cannot be read, a line has no text, or there is none at all.
    """
    texts = read_strings(file, "text") if file.suffix in JSONL_SUFFIXES else [read_text(file)]
    texts = [text for text in texts if text]
    if not texts:
        raise DataError("there is no text", got=file)
    return texts


class Perplexity:
    """Texts, what is to be scored of them, and what comes of the scores.

    Args:
        files: Each a text, or JSON Lines (`.jsonl`, `.ndjson`) with a text on each line. A window never reaches into
            another text.
        tokenizer: transformers'. Before its first token a text has the token that begins or ends documents.
        window: What is seen at once.
    """

    def __init__(self, files: Sequence[Path], tokenizer: Any, window: Window) -> None:
        self.window = window
        self.passages: list[Passage] = []
        self._owners: list[str] = []
        self._bytes = dict.fromkeys(map(str, files), 0)
        start = document_start(tokenizer)
        for file in files:
            for text in documents(file):
                tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                own = window.passages([start, *tokens])
                self.passages += own
                self._owners += [str(file)] * len(own)
                self._bytes[str(file)] += len(text.encode())

    def result(self, scores: Sequence[Score]) -> dict[str, Any]:
        """The fit of all texts together and of each file.

        Args:
            scores: Of `passages`, in order.
        """
        fits = {file: Fit(0.0, 0, size) for file, size in self._bytes.items()}
        for owner, score in zip(self._owners, scores, strict=True):
            fits[owner] += Fit(-score.total, len(score.greedy), 0)
        together = sum(fits.values(), Fit(0.0, 0, 0))
        files = {file: fit.to_dict() for file, fit in fits.items()}
        return {**together.to_dict(), **asdict(self.window), "files": files}
