"""Prompts as people write them, and what becomes of them: text, tokens, where a continuation ends."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.huggingface import companions
from megatron_ext.errors import DataError
from megatron_ext.inference.request import Request

MARGIN = 8  # tokens before a stop string: parts of a character, and what a tokenizer does to the first word


def read_prompts(file: Path) -> list[str]:
    """One prompt for each line: of a `.jsonl` file its "prompt", of another the line itself; empty lines are left out.

    Raises:
        DataError: There is no such file, or a line has no prompt.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"the prompts cannot be read: {error}", got=file) from error
    if file.suffix != ".jsonl":
        return [line for line in lines if line]
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise DataError("a line without a prompt", got=f"{file}:{number}: {line[:80]}", legal='{"prompt": "..."}')
        prompts.append(prompt)
    return prompts


def stop_tokens(checkpoint: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and those that the original's `generation_config.json` names."""
    found = {tokenizer.eos_token_id}
    if folder := companions.beside(layout.find(checkpoint).path):
        config = folder / "generation_config.json"
        named = json.loads(config.read_text()).get("eos_token_id") if config.is_file() else None
        found |= set(named) if isinstance(named, list) else {named}
    return frozenset(found - {None})


@dataclass(frozen=True)
class Writer:
    """Between text and tokens.

    Attributes:
        tokenizer: transformers' tokenizer.
        ends: Tokens that end a continuation.
        stops: Strings that end a continuation, and are not part of it.
    """

    tokenizer: Any
    ends: frozenset[int]
    stops: Sequence[str] = ()

    def encode(self, prompt: str) -> list[int]:
        """A prompt's tokens: an empty one begins as a document does."""
        return self.tokenizer(prompt)["input_ids"] or [document_start(self.tokenizer)]

    def request(self, prompt: Sequence[int], max_new_tokens: int) -> Request:
        """What to ask for, to continue these tokens."""
        return Request(prompt, max_new_tokens, self.ends, self._stopped if self.stops else None)

    def text(self, new: Sequence[int]) -> str:
        """The continuation that these tokens are."""
        text = self._decoded(new)
        cut = self._cut(text)
        return text if cut is None else text[:cut]

    def _stopped(self, new: list[int]) -> bool:
        """Whether the last token has completed a stop string, which has a token for each byte at most."""
        tail = max(len(stop.encode()) for stop in self.stops) + MARGIN
        return self._cut(self._decoded(new[-tail:])) is not None

    def _decoded(self, new: Sequence[int]) -> str:
        return self.tokenizer.decode(new, skip_special_tokens=True)

    def _cut(self, text: str) -> int | None:
        """Where the first stop string begins."""
        places = [text.find(stop) for stop in self.stops if stop in text]
        return min(places, default=None)


def document_start(tokenizer: Any) -> int:
    """The token before a document's first: the one that begins it, or else the one that ended the document before.

    Raises:
        DataError: The tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise DataError("the tokenizer has no token between documents", legal='"bos_token" or "eos_token"')
