import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_ext.errors import DataError
from megatron_ext.inference.prompts import Writer, document_start, read_prompts


def characters(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are characters."""
    words = {chr(c): c for c in range(32, 127)} | {"<end>": 0, "<begin>": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_prompts_are_lines_or_entries(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two"]
    rows = [{"prompt": "one\ntwo"}, {"prompt": "", "id": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_prompts(tmp_path / "a.jsonl") == ["one\ntwo", ""]


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "x"}', '{"prompt": 3}'])
def test_lines_without_a_prompt_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n' + line)
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        read_prompts(tmp_path / "a.jsonl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_the_first_stop_string_ends_the_text() -> None:
    writer = Writer(characters(), frozenset(), stops=["x", "ab"])
    new = writer.tokenizer("12abx")["input_ids"]
    request = writer.request(writer.encode("12"), max_new_tokens=9)
    assert [request.ended(new[:count]) for count in range(6)] == [False] * 4 + [True, True]
    assert writer.text(new) == "12"
    assert writer.text(new[:3]) == "12a"


def test_a_document_starts_after_the_token_that_begins_it_or_ended_another() -> None:
    assert document_start(characters(bos_token="<begin>", eos_token="<end>")) == 1
    assert document_start(characters(eos_token="<end>")) == 0
    with pytest.raises(DataError, match="between documents"):
        document_start(characters())
