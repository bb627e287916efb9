import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_ext.errors import DataError
from megatron_ext.inference.prompts import TextCodec, document_start, read_prompts


def characters(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are characters."""
    words = {chr(c): c for c in range(32, 127)} | {"<end>": 0, "<begin>": 1, "<turn>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_prompts_are_lines_or_entries(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two"]
    rows = [{"prompt": "one\ntwo"}, {"prompt": "", "id": 3}]
    for name in ("a.jsonl", "a.ndjson"):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
        assert read_prompts(tmp_path / name) == ["one\ntwo", ""]


def test_lines_of_prompts_end_at_line_feeds_only(tmp_path: Path) -> None:
    prompts = ["a\u2028b\x0cc", "d\u0085e"]
    (tmp_path / "a.txt").write_bytes("\r\n".join(prompts).encode())
    assert read_prompts(tmp_path / "a.txt") == prompts
    lines = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    assert read_prompts(tmp_path / "a.jsonl") == prompts


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_a_prompt_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match=r"(?s)there is no prompt.*a\.txt"):
        read_prompts(tmp_path / "a.txt")


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "x"}', '{"prompt": 3}', r'{"prompt": "\ud800"}'])
def test_lines_without_a_prompt_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n' + line)
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        read_prompts(tmp_path / "a.jsonl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_the_first_stop_string_ends_the_text() -> None:
    writer = TextCodec(characters(), frozenset(), stops=["x", "ab"])
    prompt, new = writer.encode("12ab"), writer.tokenizer("12abx")["input_ids"]
    request = writer.request(prompt, max_new_tokens=9)
    assert [request.ended(new[:count]) for count in range(6)] == [False] * 4 + [True, True]
    assert writer.text(prompt, new) == "12"
    assert writer.text(prompt, new[:3]) == "12a"


@pytest.mark.parametrize(
    ("new", "stop", "ends", "text"),
    [
        ("12<turn>", "<turn>", 3, "12"),
        ("12<turn>34", "<turn>3", 4, "12"),
        ("12ab<turn>", "b<turn>", 5, "12a"),
        ("12<turn><turn>ab", "<turn>a", 5, "12"),  # other special tokens are no text
        ("a<turn>b", "ab", 3, ""),  # the text is what is shown
    ],
)
def test_a_stop_string_may_be_a_special_token_or_have_one_in_it(new: str, stop: str, ends: int, text: str) -> None:
    writer = TextCodec(characters(additional_special_tokens=["<turn>"]), frozenset(), stops=[stop])
    prompt, tokens = writer.encode("<turn>"), writer.tokenizer(new)["input_ids"]
    request = writer.request(prompt, max_new_tokens=20)
    assert next(count for count in range(len(tokens) + 1) if request.ended(tokens[:count])) == ends
    assert writer.text(prompt, tokens) == text


def words() -> PreTrainedTokenizerFast:
    """A tokenizer that marks word starts and strips the first mark when it decodes, as Llama 2's does."""
    names = ["<s>", "</s>", "<unk>", *"abcdehtw", "▁the", "▁and", "▁", "▁a", *(f"<0x{i:02X}>" for i in range(256))]
    model = models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("length", [1, 5, 30])
@pytest.mark.parametrize("start", [["<s>"], []])
def test_prompt_and_continuation_together_are_the_text_that_the_tokens_are(start: list[str], length: int) -> None:
    tokenizer = words()
    prompt = tokenizer.convert_tokens_to_ids([*start, *["▁the", "c", "▁and"] * length])
    new = tokenizer.convert_tokens_to_ids(["▁the", "▁and", "<0xE2>", "<0x82>", "<0xAC>", "</s>", "a", "▁the"])
    for count in range(len(new) + 1):
        whole = tokenizer.decode([*prompt, *new[:count]], skip_special_tokens=True)
        text = tokenizer.decode(prompt, skip_special_tokens=True) + TextCodec(tokenizer, frozenset()).text(
            prompt, new[:count]
        )
        assert text == whole
    for stop, ends, before in (
        (" the", 1, ""),
        (" and", 2, " the"),
        ("</s>", 6, " the and€"),
        ("a the", 8, " the and€"),
    ):
        writer = TextCodec(tokenizer, frozenset(), stops=[stop])
        request = writer.request(prompt, max_new_tokens=20)
        assert next(count for count in range(len(new) + 1) if request.ended(new[:count])) == ends
        assert writer.text(prompt, new) == before
    # Late in a long text as well.
    later = [*tokenizer.convert_tokens_to_ids(["b", "▁a"]) * 40, *new]
    request = TextCodec(tokenizer, frozenset(), stops=[" and"]).request(prompt, max_new_tokens=900)
    assert next(count for count in range(len(later) + 1) if request.ended(later[:count])) == 82


def test_a_document_starts_after_the_token_that_begins_it_or_ended_another() -> None:
    assert document_start(characters(bos_token="<begin>", eos_token="<end>")) == 1
    assert document_start(characters(eos_token="<end>")) == 0
    with pytest.raises(DataError, match="between documents"):
        document_start(characters())
