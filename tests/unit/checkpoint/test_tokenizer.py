"""A checkpoint's tokenizer is known by what its tokens mean."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint import tokenizer
from megatron_ext.checkpoint.writer import writing
from megatron_ext.errors import ConfigError
from megatron_ext.inference.tokenizer import tokenizer_of
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture

MODEL = Architecture(
    pattern="-", hidden_size=4, padded_vocab_size=8, max_position_embeddings=8, ffn_hidden_size=4,
    num_attention_heads=1, num_query_groups=1, kv_channels=4, mamba_num_heads=1,
)  # fmt: skip
WORDS = {"a": 0, "b": 1, "ab": 2}


def written(directory: Path, vocabulary: object, added: dict[str, int] | None = None, **more: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokens = [{"content": content, "id": number} for content, number in (added or {}).items()]
    model = {"type": "BPE", "vocab": vocabulary, **more}
    (directory / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": tokens}))
    return directory


def checkpoint(path: Path, **args: object) -> Path:
    with writing(path, MODEL, Namespace(**args)) as writer:
        for key, shape in axes.tensors(MODEL).items():
            writer.write(key, torch.zeros(shape))
    return path / "release"


def test_a_fingerprint_is_of_the_regular_tokens_and_their_numbers(tmp_path: Path) -> None:
    plain = tokenizer.fingerprint(written(tmp_path / "plain", WORDS))
    assert plain is not None
    assert len(plain) == 32
    for name, other in {
        "order": ({"ab": 2, "b": 1, "a": 0},),
        "chat": (WORDS, {"<|user|>": 3}),
        "other chat": (WORDS, {"<|system|>": 3}),
        "special in the vocabulary": (WORDS | {"<s>": 3}, {"<s>": 3}),
        "list of pieces": ([["a", -1.0], ["b", -2.0], ["ab", -3.0]],),
    }.items():
        assert tokenizer.fingerprint(written(tmp_path / name, *other)) == plain, name
    assert tokenizer.fingerprint(written(tmp_path / "merges", WORDS, merges=["a b"])) == plain
    for name, other in {"swapped": {"a": 1, "b": 0, "ab": 2}, "renamed": {"a": 0, "c": 1, "ab": 2}}.items():
        assert tokenizer.fingerprint(written(tmp_path / name, other)) not in (plain, None), name
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    assert tokenizer.fingerprint(tmp_path / "damaged") is None
    assert tokenizer.fingerprint(tmp_path) is None


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """Whether the checkpoint keeps the fingerprint, or the tokenizer itself; and by whoever is given one."""
    right, wrong = written(tmp_path / "right", WORDS), written(tmp_path / "wrong", {"a": 1, "b": 0, "ab": 2})
    kept = tokenizer.fingerprint(right)
    trained = checkpoint(tmp_path / "trained", tokenizer_model=str(right), tokenizer_fingerprint=kept)
    converted = checkpoint(tmp_path / "converted")
    written(converted.parent / "huggingface", WORDS)
    (converted.parent / "huggingface" / "config.json").write_text("{}")
    megatrons = checkpoint(tmp_path / "megatrons", tokenizer_model=str(right), tokenizer_type="HuggingFaceTokenizer")
    for step in (trained, converted, megatrons):
        assert tokenizer.check(step, right, "the teacher")
        assert not tokenizer.check(step, None, "the teacher")
        with pytest.raises(ConfigError, match="the teacher has another tokenizer") as error:
            tokenizer.check(step, wrong, "the teacher")
        assert f"got:   {wrong}" in str(error.value)
        with pytest.raises(ConfigError, match="the checkpoint has another tokenizer"):
            tokenizer_of(step.parent, wrong)
    with pytest.raises(ConfigError, match=f"legal: {right}"):
        tokenizer.check(trained, wrong, "the teacher")


def test_of_what_is_not_known_nothing_is_said(tmp_path: Path) -> None:
    right, wrong = written(tmp_path / "right", WORDS), written(tmp_path / "wrong", {"a": 1, "b": 0, "ab": 2})
    silent = checkpoint(tmp_path / "silent")
    # A path that is relative may be another file by now.
    moved = checkpoint(tmp_path / "moved", tokenizer_model="right", tokenizer_type="HuggingFaceTokenizer")
    for step in (silent, moved):
        assert not tokenizer.check(step, wrong, "the teacher")
    kept = tokenizer.fingerprint(right)
    trained = checkpoint(tmp_path / "trained", tokenizer_fingerprint=kept)
    assert not tokenizer.check(trained, tmp_path / "sentencepiece.model", "the teacher")


def test_a_command_line_names_one(tmp_path: Path) -> None:
    right = written(tmp_path / "right", WORDS)
    args = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(right))
    assert tokenizer.of_run(args) == tokenizer.fingerprint(right)
    assert tokenizer.of_run(Namespace(tokenizer_type="NullTokenizer", tokenizer_model=None)) is None
