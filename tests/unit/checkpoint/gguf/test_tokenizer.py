"""Tokenizers of GGUF files: token for token what transformers makes of them, and back into metadata."""

import json
from pathlib import Path
from typing import Any

import gguf_files
import pytest
from tokenizers import Tokenizer

from megatron_ext.checkpoint.gguf.entries import Described
from megatron_ext.checkpoint.gguf.file import GgufTensor
from megatron_ext.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS
from megatron_ext.checkpoint.gguf.tokenizer import write_tokenizer
from megatron_ext.checkpoint.gguf.tokenizer_metadata import tokenizer_metadata
from megatron_ext.errors import ConfigError

ROWS = 310
TEXT = "hello world, hello! World's 2026\n\n<think>  \u00fc\u00df \u6771\u4eac <|turn|>hello world <|end|>"


def described(metadata: dict[str, Any]) -> Described:
    embedding = GgufTensor((ROWS, 8), "F32", Path("none"), 0, 32)
    own = {"general.architecture": "llama", "llama.context_length": 64} | metadata
    return Described(Path("none"), own, {"token_embd.weight": embedding})


def written(metadata: dict[str, Any], folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    write_tokenizer(described(metadata), folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-4o", "gpt-2"])
def test_byte_level_tokens_are_those_of_transformers(tmp_path: Path, pre: str) -> None:
    from transformers import AutoTokenizer

    metadata = gguf_files.byte_level(ROWS) | {"tokenizer.ggml.pre": pre, ".context_length": 64}
    gguf_files.write(tmp_path / "a.gguf", "llama", metadata, {})
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    own = written(metadata, tmp_path / "own")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "own")
    found = own.encode(TEXT).ids
    assert found == theirs.encode(TEXT) == loaded.encode(TEXT)
    assert {"hello", "<think>", "<|end|>", "\u0120world"} <= set(own.encode(TEXT).tokens)
    assert own.decode(found, skip_special_tokens=False) == TEXT
    turn = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(turn, tokenize=False) == theirs.apply_chat_template(turn, tokenize=False)
    assert (loaded.bos_token, loaded.eos_token) == (theirs.bos_token, theirs.eos_token) == ("<|end|>", "<|end|>")


@pytest.mark.filterwarnings("ignore")
def test_sentencepiece_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    metadata = gguf_files.sentencepiece()
    gguf_files.write(tmp_path / "a.gguf", "llama", metadata | {".context_length": 64}, {})
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    own = written(metadata, tmp_path / "own")
    text = "hello world, hell or\u00fc 12\nhello"
    found = own.encode(text)
    assert found.ids == theirs.encode(text)
    assert found.tokens[:2] == ["<s>", "\u2581hello"]
    assert "<0xC3>" in found.tokens
    assert own.decode(found.ids) == text


def test_digits_are_apart_where_llama_cpp_takes_them_apart(tmp_path: Path) -> None:
    """What transformers leaves out, and what `tokenizer.json` of SmolLM2 says: blanks before a number stay together."""
    own = written(gguf_files.byte_level(ROWS) | {"tokenizer.ggml.pre": "smollm"}, tmp_path)
    assert own.pre_tokenizer.pre_tokenize_str("a  12")[1:] == [("\u0120\u0120", (1, 3)), ("1", (3, 4)), ("2", (4, 5))]


@pytest.mark.parametrize(
    "metadata",
    [gguf_files.byte_level(ROWS), gguf_files.byte_level(ROWS) | {"tokenizer.ggml.add_bos_token": True},
     gguf_files.sentencepiece(), gguf_files.sentencepiece() | {"tokenizer.ggml.add_space_prefix": False}],
    ids=["bytes", "begins", "pieces", "no prefix"],
)  # fmt: skip
def test_there_and_back(tmp_path: Path, metadata: dict[str, Any]) -> None:
    first = written(metadata, tmp_path / "first")
    again = tokenizer_metadata(tmp_path / "first", ROWS)
    for key in ("model", "tokens", "merges", "bos_token_id", "eos_token_id", "add_bos_token"):
        if (before := metadata.get(f"tokenizer.ggml.{key}")) is not None:
            after = again[f"tokenizer.ggml.{key}"]
            assert (after[: len(before)] if isinstance(before, list) else after) == before, key
    assert (
        again["tokenizer.ggml.token_type"][: len(metadata["tokenizer.ggml.token_type"])]
        == (metadata["tokenizer.ggml.token_type"])
    )
    assert len(again["tokenizer.ggml.tokens"]) == len(again["tokenizer.ggml.token_type"]) == ROWS
    assert again.get("tokenizer.chat_template") == metadata.get("tokenizer.chat_template")
    second = written(again, tmp_path / "second")
    assert second.encode(TEXT).ids == first.encode(TEXT).ids
    assert (tmp_path / "second/tokenizer_config.json").read_text() == (
        tmp_path / "first/tokenizer_config.json"
    ).read_text()


def test_every_way_to_split_is_recognised(tmp_path: Path) -> None:
    for name, pre in PRE_TOKENIZERS.items():
        written(gguf_files.byte_level(ROWS) | {"tokenizer.ggml.pre": name}, tmp_path)
        again = PRE_TOKENIZERS[tokenizer_metadata(tmp_path, ROWS)["tokenizer.ggml.pre"]]
        assert (again.steps, again.ignore_merges) == (pre.steps, pre.ignore_merges), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the way in which this tokenizer splits texts"),
        ({"normalizer": {"type": "Lowercase"}}, "the way in which this tokenizer splits texts"),
        ({"model": {"type": "Unigram", "vocab": []}}, "a tokenizer of the kind 'Unigram'"),
        ({"model": {"type": "BPE", "vocab": {"a": ROWS}, "merges": []}}, "more tokens than the model"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    written(gguf_files.byte_level(ROWS), tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        tokenizer_metadata(tmp_path, ROWS)
