"""Lines end where JSON Lines says, and nowhere else."""

import json
from pathlib import Path

import pytest

from megatron_ext.data.lines import read_strings, read_text, split_lines
from megatron_ext.errors import DataError

INSIDE = "a\u2028b\u2029c\u0085d\x0ce\x0bf\x1cg"  # where str.splitlines would cut


def test_a_line_ends_at_a_line_feed_only() -> None:
    assert split_lines(f"\ufeff{INSIDE}\r\n\n x \nlast") == [INSIDE, "", " x ", "last"]
    assert split_lines("one\n") == ["one"]
    assert split_lines("") == []
    assert split_lines("a\rb\r\r\n") == ["a\rb\r"]


def test_a_text_is_what_the_file_holds(tmp_path: Path) -> None:
    content = "\ufeffone\r\ntwo\rthree\n" + INSIDE
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert read_text(tmp_path / "a.txt") == content
    (tmp_path / "a.txt").write_bytes("Übung".encode("latin-1"))
    with pytest.raises(DataError, match=r"(?s)cannot be read.*a\.txt.*UTF-8"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(DataError, match="No such file"):
        read_text(tmp_path / "none")


def test_strings_of_a_jsonl_file(tmp_path: Path) -> None:
    rows = [{"text": INSIDE}, {"text": "", "id": 3}, {"text": "last"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + "\r\n".join([lines[0], "  ", *lines[1:]])).encode())
    assert read_strings(tmp_path / "a.jsonl", "text") == [INSIDE, "", "last"]


@pytest.mark.parametrize("line", ["{", "[]", '{"txt": "x"}', '{"text": 5}', r'{"text": "\ud800"}', "[" * 100_000])
def test_a_line_without_the_string_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line)
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        read_strings(tmp_path / "a.jsonl", "text")
