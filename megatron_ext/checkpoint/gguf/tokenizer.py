"""The tokenizer in a GGUF file's metadata, as `tokenizer.json` and `tokenizer_config.json`.

`tokenizer.ggml.model` is `gpt2` for byte-level merges and `llama` for sentencepiece's, whose merges follow from the
scores of its tokens. Texts are split and prefixed as llama.cpp does.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.gguf.entries import Described
from megatron_ext.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.errors import CheckpointError, ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""`tokenizer.ggml.token_type`."""
NO_TOKENIZER = "none"
SPACE = "\u2581"
PADDING = re.compile(r"^\[PAD\d+\]$")
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Their names in `tokenizer_config.json`, and in metadata before `_token_id`."""
_GIVE_ONE = "--tokenizer DIR, a directory with the tokenizer.json of the original model"


def write_tokenizer(given: Described, folder: Path) -> None:
    """Write the tokenizer of a file into a directory, if it has one.

    Raises:
        ConfigError: It is of a kind that is not converted.
        CheckpointError: It is damaged.
    """
    kind = given.metadata.get("tokenizer.ggml.model")
    if kind == NO_TOKENIZER:
        return
    read = _Vocabulary.of(given)
    if kind == "gpt2":
        described, begins = _byte_level(given, read), _pre_tokenizer(given).begins
    elif kind == "llama":
        described, begins = _sentencepiece(given, read), True
    else:
        raise ConfigError("the file's tokenizer is of a kind that is not converted", got=repr(kind), legal=_GIVE_ONE)
    names = {name: read.special(given, key) for name, key in SPECIAL.items()}
    begins = given.metadata.get("tokenizer.ggml.add_bos_token", begins) and names["bos_token"] is not None
    ends = given.metadata.get("tokenizer.ggml.add_eos_token", False) and names["eos_token"] is not None
    around = [names["bos_token"] if begins else None, names["eos_token"] if ends else None]
    described["post_processor"] = _around(around, read.tokens, described["post_processor"])
    described["added_tokens"] = read.added()
    (folder / hf_assets.TOKENIZER).write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"model_max_length": given.whole("context_length")}
    config |= {name: token for name, token in names.items() if token is not None}
    if isinstance(template := given.metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens by number, and the kind of each."""

    tokens: Sequence[str]
    kinds: Sequence[int]

    @classmethod
    def of(cls, given: Described) -> "_Vocabulary":
        tokens = given.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise ConfigError("the file has no tokenizer", got=given.path, legal=_GIVE_ONE)
        kinds = given.metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
        rows = given.tensors["token_embd.weight"].shape[0]
        if not isinstance(kinds, list) or len(kinds) != len(tokens) or len(tokens) > rows:
            got = f"{len(tokens)} tokens, {len(kinds)} types, {rows} rows of the embedding"
            raise CheckpointError("GGUF: the tokenizer is not the model's", got=got)
        return cls(tokens, kinds)

    def numbers(self) -> dict[str, int]:
        """The number of each token, but of those that only fill the vocabulary up; the first of two that are alike."""
        found: dict[str, int] = {}
        for number, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)):
            if not (kind == UNUSED and PADDING.match(token)):
                found.setdefault(token, number)
        return found

    def special(self, given: Described, name: str) -> str | None:
        """The token of this role."""
        number = given.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is None or number == 2**32 - 1:  # llama.cpp's "none"
            return None
        if type(number) is not int or not 0 <= number < len(self.tokens):
            raise CheckpointError(f"GGUF: tokenizer.ggml.{name}_token_id is no token", got=number)
        return self.tokens[number]

    def added(self) -> list[dict[str, Any]]:
        """Tokens that a text is searched for before it is split."""
        return [
            {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": self.kinds[number] != USER_DEFINED}
            for token, number in self.numbers().items() if token and self.kinds[number] in (CONTROL, USER_DEFINED)
        ]  # fmt: skip


def _pre_tokenizer(given: Described) -> PreTokenizer:
    name = given.metadata.get("tokenizer.ggml.pre", "gpt-2")
    if name not in PRE_TOKENIZERS:
        legal = f"{', '.join(PRE_TOKENIZERS)}; or {_GIVE_ONE}"
        raise ConfigError("the file's tokenizer splits texts in a way that is not converted", got=name, legal=legal)
    return PRE_TOKENIZERS[name]


def _byte_level(given: Described, read: _Vocabulary) -> dict[str, Any]:
    merges = given.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise CheckpointError("GGUF: tokenizer.ggml.merges is missing", got=given.path)
    pre = _pre_tokenizer(given)
    pairs = [_pair(merge) for merge in merges]
    model = _merging(read.numbers(), pairs, ignore_merges=pre.ignore_merges)
    bytes_again = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return _described(model, None, pre.to_json(), bytes_again, bytes_again | {"trim_offsets": False})


def _pair(merge: str) -> tuple[str, str]:
    """The two sides of a merge, which a space divides; the first may begin with one."""
    place = merge.find(" ", 1)
    return merge[:place], merge[place + 1 :]


def _sentencepiece(given: Described, read: _Vocabulary) -> dict[str, Any]:
    scores = given.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(read.tokens):
        raise CheckpointError("GGUF: tokenizer.ggml.scores is missing, or has another length", got=given.path)
    numbers = read.numbers()
    plain = [token for token, number in numbers.items() if read.kinds[number] in (NORMAL, UNUSED)]
    pairs = _merges_of({token: scores[numbers[token]] for token in plain})
    model = _merging(numbers, pairs, unk_token=read.special(given, "unknown"), fuse_unk=True, byte_fallback=True)
    prefix = given.metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}, spaces] if prefix else [spaces]
    after = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]  # fmt: skip
    normalizer = {"type": "Sequence", "normalizers": before}
    return _described(model, normalizer, None, {"type": "Sequence", "decoders": after}, None)


def _merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Merges in the order in which sentencepiece makes them: the best token first, whatever its two sides."""
    order = {token: place for place, token in enumerate(scores)}
    found: list[tuple[float, int, int, int, str, str]] = []
    for place, (token, score) in enumerate(scores.items()):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in order and right in order:
                found.append((-score, place, order[left], order[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _merging(numbers: Mapping[str, int], merges: Iterable[tuple[str, str]], **own: Any) -> dict[str, Any]:
    defaults = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return defaults | own | {"vocab": numbers, "merges": list(merges)}


def _described(model: Any, normalizer: Any, pre_tokenizer: Any, decoder: Any, post: Any) -> dict[str, Any]:
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": post, "decoder": decoder, "model": model,
    }  # fmt: skip


def _around(ends: Sequence[str | None], tokens: Sequence[str], otherwise: Any) -> Any:
    """What puts a token before and one after a text, if any."""
    first, last = ends
    if first is None and last is None:
        return otherwise

    def one(text: str) -> list[dict[str, Any]]:
        kind = "AB".index(text)
        before, after = (
            [] if token is None else [{"SpecialToken": {"id": token, "type_id": kind}}] for token in (first, last)
        )
        return [*before, {"Sequence": {"id": text, "type_id": kind}}, *after]

    special = {
        token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]} for token in (first, last) if token
    }
    return {"type": "TemplateProcessing", "single": one("A"), "pair": [*one("A"), *one("B")], "special_tokens": special}
