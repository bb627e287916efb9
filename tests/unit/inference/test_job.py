"""What `megatron-ext generate` does with what it has when it is told to stop."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext import cli
from megatron_ext.inference import generate as generation
from megatron_ext.inference import job
from megatron_ext.inference.interrupt import Interrupted
from tests.unit.inference.test_prompts import characters


def test_what_there_is_at_a_signal_is_kept_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = characters(eos_token="<end>")
    architecture = SimpleNamespace(pattern="*-", max_position_embeddings=4, position_embedding_type="rope")

    def stopped(*_: Any) -> Iterator[tuple[int, list[int]]]:
        yield 1, tokenizer("xy")["input_ids"]
        raise Interrupted(15)

    @contextmanager
    def opened(*_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(generation, "generate", stopped)
    for name, value in (("tokenizer_of", tokenizer), ("stop_tokens", frozenset()), ("vocab_size_of", 128)):
        monkeypatch.setattr(job, name, lambda *_, value=value: value)
    monkeypatch.setattr(job.layout, "find", lambda path: None)
    monkeypatch.setattr(job.session, "open_checkpoint", opened)
    monkeypatch.setattr(job.session, "prepare", lambda *_: SimpleNamespace(architecture=architecture))
    output = tmp_path / "out.jsonl"
    flags = ["--prompt", "ab", "--prompt", "c", "--max-new-tokens", "3", "--output", str(output)]
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "model", *flags])
    assert ended.value.code == 143
    assert not output.exists()
    (row,) = map(json.loads, (tmp_path / "out.jsonl.partial").read_text().splitlines())
    assert row == {"prompt": "c", "text": "xy", "tokens": tokenizer("xy")["input_ids"]}
    printed = capsys.readouterr()
    assert "SIGTERM: not all prompts were continued; wrote" in printed.out
    assert "1 of 2 prompts may reach with their new tokens beyond the 4 positions" in printed.err
