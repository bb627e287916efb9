"""How well a model predicts text: perplexity and bits per byte, in windows that slide over it."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ext.data.lines import JSONL_SUFFIXES, read_strings, read_text
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.inference.loglikelihood import Loglikelihood, LoglikelihoodRequest
from megatron_ext.inference.prompts import document_start
from megatron_ext.reports.results import UNFINISHED


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

    def passages(self, tokens: Sequence[int]) -> list[LoglikelihoodRequest]:
        """What is to be scored so that each token but the first is predicted once."""
        found, done = [], 1
        while done < len(tokens):
            stop = min(len(tokens), self.size + 1 if done == 1 else done + self.stride)
            start = max(0, stop - self.size - 1)
            found.append(LoglikelihoodRequest(tokens[start:stop], done - start))
            done = stop
        return found


@dataclass(frozen=True)
class TextLoss:
    """How well a text is predicted.

    Attributes:
        nats: The negative log-probability of all its tokens.
        tokens: How many they are.
        bytes: How long it is in UTF-8.
    """

    nats: float
    tokens: int
    bytes: int

    def __add__(self, other: "TextLoss") -> "TextLoss":
        return TextLoss(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

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

    Attributes:
        texts: Tells one choice of texts from another: a hash of all of them.

    Raises:
        DataError: There is no text, or the tokenizer has no tokens for it.
    """

    def __init__(self, files: Sequence[Path], tokenizer: Any, window: Window) -> None:
        self.window = window
        self._passages: dict[str, list[LoglikelihoodRequest]] = {}
        self._bytes: dict[str, int] = {}
        start, content = document_start(tokenizer), hashlib.sha256()
        for name, file in {str(file): file for file in files}.items():
            texts = documents(file)
            tokens = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
            self._passages[name] = [passage for own in tokens for passage in window.passages([start, *own])]
            self._bytes[name] = sum(len(text.encode()) for text in texts)
            if not self._passages[name]:
                raise DataError("the tokenizer makes no token of the text", got=file)
            for text in texts:
                content.update(hashlib.sha256(text.encode()).digest())
        self.texts = content.hexdigest()[:16]

    def results(
        self, score: Callable[[Sequence[LoglikelihoodRequest]], Sequence[Loglikelihood]], at_once: int
    ) -> Iterator[dict[str, Any]]:
        """Score file after file, small ones together.

        Args:
            score: Scores passages, in order.
            at_once: Tokens that are scored together at least, if there are as many.

        Yields:
            The fit of each file that is done, and of all of them together; `unfinished` says which are not.
        """
        fits: dict[str, TextLoss] = {}
        files = list(self._passages)
        while len(fits) < len(files):
            group: list[str] = []
            while len(fits) + len(group) < len(files) and self._tokens(group) < at_once:
                group.append(files[len(fits) + len(group)])
            scores = iter(score([passage for file in group for passage in self._passages[file]]))
            for file in group:
                own = list(islice(scores, len(self._passages[file])))
                nats, tokens = -sum(score.total for score in own), sum(len(score.greedy) for score in own)
                fits[file] = TextLoss(nats, tokens, self._bytes[file])
            together = sum(fits.values(), TextLoss(0.0, 0, 0))
            left = {UNFINISHED: files[len(fits) :]} if len(fits) < len(files) else {}
            done = {file: fit.to_dict() for file, fit in fits.items()}
            yield {**together.to_dict(), **asdict(self.window), "files": done, **left}

    def _tokens(self, files: Sequence[str]) -> int:
        return sum(len(passage.tokens) for file in files for passage in self._passages[file])
