"""A tokenizer as metadata of a GGUF file: the inverse of `tokenizer`."""

import json
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.gguf.pretokenizers import recognised
from megatron_ext.checkpoint.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.errors import ConfigError

_CHARACTER = -1e6  # score of what no merge makes


def tokenizer_metadata(folder: Path, rows: int) -> dict[str, Any]:
    """What a file says of the tokenizer of a directory.

    Args:
        folder: Where `tokenizer.json` lies, and what goes with it.
        rows: Rows of the embedding; llama.cpp wants a token for each.

    Raises:
        ConfigError: llama.cpp cannot do what it does, or it has more tokens than the model.
    """
    described = json.loads((folder / hf_assets.TOKENIZER).read_text(encoding="utf-8"))
    model = described.get("model", {})
    added = {entry["content"]: entry for entry in described.get("added_tokens") or ()}
    if model.get("type") != "BPE":
        raise _cannot(f"a tokenizer of the kind {model.get('type')!r}", "byte-level or sentencepiece BPE")
    numbers: dict[str, int] = model["vocab"] | {token: entry["id"] for token, entry in added.items()}
    if max(numbers.values(), default=0) >= rows:
        raise ConfigError("the tokenizer has more tokens than the model", got=max(numbers.values()) + 1, legal=rows)
    config = _config(folder)
    special = {name: _text(config.get(name)) for name in SPECIAL}
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [UNUSED] * rows
    for token, number in numbers.items():
        tokens[number] = token
        kinds[number] = NORMAL if token not in added else CONTROL if added[token]["special"] else USER_DEFINED
    values: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        values |= _sentencepiece(described, values, merges, special["unk_token"])
    else:
        values |= _byte_level(described, merges)
    for name, key in SPECIAL.items():
        if (token := special[name]) is not None and token in numbers:
            values[f"tokenizer.ggml.{key}_token_id"] = numbers[token]
    begins, ends = _around(folder)
    values["tokenizer.ggml.add_bos_token"] = begins is not None
    values["tokenizer.ggml.add_eos_token"] = ends is not None
    if begins is not None:
        values["tokenizer.ggml.bos_token_id"] = begins
    if ends is not None:
        values["tokenizer.ggml.eos_token_id"] = ends
    if (template := _template(folder, config)) is not None:
        values["tokenizer.chat_template"] = template
    return values


def _byte_level(described: dict[str, Any], merges: list[tuple[str, ...]]) -> dict[str, Any]:
    pre = recognised(described)
    normalizer = (described.get("normalizer") or {}).get("type")
    if pre is None or normalizer not in (None, "NFC"):
        got = json.dumps(described.get("pre_tokenizer") if pre is None else described["normalizer"])[:300]
        raise _cannot(
            f"the way in which this tokenizer splits texts: {got}", "that of GPT-2, Llama 3, Qwen, SmolLM, ..."
        )
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges], "tokenizer.ggml.add_space_prefix": False,
    }  # fmt: skip


def _sentencepiece(
    described: dict[str, Any], values: dict[str, Any], merges: list[tuple[str, ...]], unknown: str | None
) -> dict[str, Any]:
    """Scores that make the same merges: sentencepiece takes the best, and the first merge is the best."""
    steps = json.dumps([described.get("normalizer"), described.get("pre_tokenizer")], ensure_ascii=False)
    if SPACE not in steps:
        raise _cannot(f"the way in which this tokenizer marks spaces: {steps[:300]}", f"{SPACE} in the place of each")
    first: dict[str, int] = {}
    for place, merge in enumerate(merges):
        first.setdefault("".join(merge), place)
    kinds = list(values["tokenizer.ggml.token_type"])
    for number, token in enumerate(tokens := values["tokenizer.ggml.tokens"]):
        if kinds[number] in (NORMAL, CONTROL) and token == unknown:
            kinds[number] = UNKNOWN
        elif kinds[number] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            kinds[number] = BYTE
    prefix = '"prepend"' in steps or '"prepend_scheme": "first"' in steps or '"prepend_scheme": "always"' in steps
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [float(-first[token]) if token in first else _CHARACTER for token in tokens],
        "tokenizer.ggml.add_space_prefix": prefix,
    }  # fmt: skip


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found |= json.loads((folder / name).read_text(encoding="utf-8"))
    return found


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _around(folder: Path) -> tuple[int | None, int | None]:
    """The tokens that are put before and after each text."""
    from tokenizers import Tokenizer

    read = Tokenizer.from_file(str(folder / hf_assets.TOKENIZER))
    plain, whole = (read.encode("a", add_special_tokens=special).ids for special in (False, True))
    if not plain or len(whole) == len(plain):
        return None, None
    at = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    after = whole[at + len(plain) :]
    return whole[0] if at else None, after[-1] if after else None


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template of a conversation: a file of its own, or an entry."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((each.get("template") for each in template if each.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _cannot(what: str, legal: str) -> ConfigError:
    return ConfigError(f"llama.cpp does not know {what}", legal=f"{legal}; or --vocab-size N, which writes none")
