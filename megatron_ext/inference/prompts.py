"""Prompts as people write them, and what becomes of them: text, tokens, where a continuation ends."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.data.lines import JSONL_SUFFIXES, read_strings, read_text, split_lines
from megatron_ext.errors import DataError
from megatron_ext.inference.request import Request

MARGIN = 8  # tokens before others that are decoded: parts of a character, and what a tokenizer does to the first word


def read_prompts(file: Path) -> list[str]:
    """One prompt for each line: of a JSON Lines file its "prompt", of another the line itself; empty ones left out.

    Raises:
        DataError: There is no such file, a line has no prompt, or no line has one.
    """
    if file.suffix in JSONL_SUFFIXES:
        prompts = read_strings(file, "prompt")
    else:
        prompts = [line for line in split_lines(read_text(file)) if line]
    if not prompts:
        raise DataError("there is no prompt", got=file, legal="one on each line")
    return prompts


def stop_tokens(checkpoint: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and those that the original's `generation_config.json` names."""
    found = {tokenizer.eos_token_id}
    if folder := hf_assets.assets_of(layout.find(checkpoint).path):
        config = folder / "generation_config.json"
        named = json.loads(config.read_text()).get("eos_token_id") if config.is_file() else None
        found |= set(named) if isinstance(named, list) else {named}
    return frozenset(found - {None})


@dataclass(frozen=True)
class TextCodec:
    """Between text and tokens.

    Attributes:
        tokenizer: transformers' tokenizer.
        ends: Tokens that end a continuation.
        stops: Strings that end a continuation, and are not part of it.
    """

    tokenizer: Any
    ends: frozenset[int]
    stops: Sequence[str] = ()

    def encode(self, prompt: str, special: bool = True) -> list[int]:
        """A prompt's tokens: an empty one begins as a document does; `special`: with what a tokenizer puts around."""
        return self.tokenizer(prompt, add_special_tokens=special)["input_ids"] or [document_start(self.tokenizer)]

    def request(self, prompt: Sequence[int], max_new_tokens: int) -> Request:
        """What to ask for, to continue these tokens."""
        return Request(prompt, max_new_tokens, self.ends, partial(self._stopped, prompt) if self.stops else None)

    def text(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The continuation that these tokens are, after those of the prompt."""
        before = self._last(prompt)
        text = self._until_stop(before, new)
        return self._added(before, new) if text is None else text

    def _stopped(self, prompt: Sequence[int], new: Sequence[int]) -> bool:
        """Whether the last token has completed a stop string, which has a token for each byte at most."""
        tail = max(len(stop.encode()) for stop in self.stops) + MARGIN
        known = max(0, len(new) - tail)
        before = self._last([*prompt[-MARGIN:], *new[:known]] if known else prompt)
        return self._until_stop(before, new[known:]) is not None

    def _last(self, tokens: Sequence[int]) -> Sequence[int]:
        """The last of these tokens, or all where the last are no text."""
        last = tokens[-MARGIN:]
        return last if self.tokenizer.decode(last, skip_special_tokens=True) else tokens

    def _added(self, before: Sequence[int], new: Sequence[int], special: bool = False) -> str:
        """The text that tokens add to that of others, with special tokens written out or left out.

        Decoded alone, they would lose the space before their first word with tokenizers that mark word starts (Llama
        2's, Mistral's).
        """
        first = self.tokenizer.decode(before, skip_special_tokens=not special)
        whole = self.tokenizer.decode([*before, *new], skip_special_tokens=not special)
        # Not simply as many letters as the first has: it may end within one, which only the new tokens complete.
        return whole[_common(first, whole) :]

    def _until_stop(self, before: Sequence[int], new: Sequence[int]) -> str | None:
        """The text before the first stop string; None where there is none.

        A stop string may be a special token or have one in it (`<|im_end|>`), or lie on both sides of one.
        """
        text = self._added(before, new)
        written = self._added(before, new, special=True)
        found = False
        if written != text and (place := self._first_stop(written)) is not None:
            found, count, head = True, len(new), written
            while not (len(head) <= place and written.startswith(head)):
                count -= 1
                head = self._added(before, new[:count], special=True)
            # Of the token that the stop string begins in, what is before it.
            text = self._added(before, new[:count]) + written[len(head) : place]
        place = self._first_stop(text)
        if place is not None:
            return text[:place]
        return text if found else None

    def _first_stop(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((text.find(stop) for stop in self.stops if stop in text), default=None)


def _common(one: str, other: str) -> int:
    """Letters that two texts begin with alike."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def document_start(tokenizer: Any) -> int:
    """The token before a document's first: the one that begins it, or else the one that ended the document before.

    Raises:
        DataError: The tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise DataError("the tokenizer has no token between documents", legal='"bos_token" or "eos_token"')
