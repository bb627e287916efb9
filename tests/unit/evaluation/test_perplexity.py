import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError, DataError
from megatron_ext.evaluation.perplexity import Perplexity, Window, documents
from megatron_ext.inference.loglikelihood import Loglikelihood, LoglikelihoodRequest


class Bytes:
    """A tokenizer whose tokens are bytes."""

    bos_token_id, eos_token_id = None, 256

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


@given(st.integers(0, 40), st.integers(1, 12), st.data())
def test_each_token_is_predicted_once_with_as_much_context_as_promised(length: int, size: int, data: st.DataObject):
    stride = data.draw(st.integers(1, size))
    tokens = list(range(length))
    predicted: list[int] = []
    for passage in Window(size, stride).passages(tokens):
        assert len(passage.tokens) <= size + 1  # it reads at most `size`
        begin = passage.tokens[0]
        assert list(passage.tokens) == tokens[begin : begin + len(passage.tokens)]
        new = passage.tokens[passage.first :]
        assert 1 <= len(new) <= (size if not predicted else stride)
        # Each prediction sees the whole text before it, or at least size - stride + 1 tokens of it.
        assert begin == 0 or passage.first > size - stride
        predicted += new
    assert predicted == tokens[1:]


@pytest.mark.parametrize(("size", "stride"), [(4, 0), (4, 5), (0, 0)])
def test_a_stride_that_skips_or_stands_is_refused(size: int, stride: int) -> None:
    with pytest.raises(ConfigError, match="stride"):
        Window(size, stride)


def test_files_are_told_apart_and_counted_in_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.jsonl"
    first.write_text("grün")
    second.write_text(json.dumps({"text": "ab"}) + "\n\n" + json.dumps({"text": "cde"}) + "\n")
    task = Perplexity([first, second, first], Bytes(), Window(3, 2))
    asked: list[int] = []

    def score(passages: Sequence[LoglikelihoodRequest]) -> list[Loglikelihood]:
        asked.append(len(passages))
        assert passages[0].tokens[0] == 256  # each text begins after the end of another
        counts = [len(p.tokens) - p.first for p in passages]
        return [Loglikelihood(torch.full((n,), -2 * math.log(2.0)), torch.ones(n) > 0) for n in counts]

    (result,) = task.results(score, at_once=1000)
    half, again = task.results(score, at_once=1)  # a file at a time
    assert again == result
    assert half["unfinished"] == [str(second)]
    assert half["files"] == {str(first): result["files"][str(first)]}
    assert asked == [sum(asked[1:]), *asked[1:]]
    assert (result["tokens"], result["bytes"]) == (10, 10)
    assert result["loss"] == pytest.approx(2 * math.log(2))
    assert result["perplexity"] == pytest.approx(4)
    assert result["bits_per_byte"] == pytest.approx(2)
    assert [(f["tokens"], f["bytes"]) for f in result["files"].values()] == [(5, 5), (5, 5)]
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.jsonl", b"{}", r"(?s)without a text.*a\.jsonl:1"),
        ("a.ndjson", b'{"text": "x"}\n{"text": 5}', r"(?s)without a text.*a\.ndjson:2"),
        ("a.jsonl", rb'{"text": "\ud800"}', r"(?s)without a text.*a\.jsonl:1"),
        ("a.jsonl", b"\n", "no text"),
    ],
)
def test_texts_that_are_none_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents(tmp_path / name)


def test_texts_are_scored_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r")
    assert documents(tmp_path / "a.txt") == ["one\r\ntwo\r"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("a\u2028b\u0085c\x0cd", "", "e")]
    for name in ("b.jsonl", "b.ndjson"):
        (tmp_path / name).write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
        assert documents(tmp_path / name) == ["a\u2028b\u0085c\x0cd", "e"]


def test_other_texts_are_told_apart_and_texts_without_tokens_are_named(tmp_path: Path) -> None:
    for name, content in (("a", "ab"), ("b", "ac"), ("c", "ab")):
        (tmp_path / f"{name}.txt").write_text(content)
    texts = {name: Perplexity([tmp_path / f"{name}.txt"], Bytes(), Window(3, 2)).texts for name in "abc"}
    assert texts["a"] == texts["c"] != texts["b"]

    class Deaf(Bytes):
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": []}

    with pytest.raises(DataError, match=r"(?s)no token.*a\.txt"):
        Perplexity([tmp_path / "a.txt"], Deaf(), Window(3, 2))
