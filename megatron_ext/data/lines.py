"""Text files as they are, and their lines as JSON Lines and lists of prompts have them.

Lines end at a line feed alone, with or without a carriage return before it. Python's `str.splitlines` also cuts at
U+2028, U+2029, U+0085 and form feeds, which a JSON string may hold unescaped (RFC 8259, section 7).
"""

import json
from pathlib import Path

from megatron_ext.errors import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
BOM = "\ufeff"


def read_text(file: Path) -> str:
    """The exact text of a UTF-8 file: no line end is translated.

    Raises:
        DataError: It cannot be read, or is not UTF-8.
    """
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeError) as error:
        raise DataError(f"the text cannot be read: {error}", got=file, legal="a file in UTF-8") from error


def split_lines(text: str) -> list[str]:
    """The lines of a text without their ends, and without a byte order mark before the first."""
    lines = text.removeprefix(BOM).split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def read_strings(file: Path, key: str) -> list[str]:
    """The string under `key` of every line of a JSON Lines file that is not blank.

    Raises:
        DataError: The file cannot be read, or a line, which is named, has no such string.
    """
    strings = []
    for number, line in enumerate(split_lines(read_text(file)), start=1):
        if not line.strip():
            continue
        try:
            strings.append(string_of(line, key))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            where = f"{file}:{number}: {ascii(line[:80])[1:-1]}"
            raise DataError(f"a line without a {key} ({error!r})", got=where, legal=f'{{"{key}": "..."}}') from error
    return strings


def string_of(line: str, key: str) -> str:
    """The string under `key` of a line of JSON.

    Raises:
        UnicodeError: A JSON escape spells half a surrogate pair, which is no text.
        ValueError, KeyError, TypeError, RecursionError: It is no JSON object with such a string.
    """
    text = json.loads(line)[key]
    if not isinstance(text, str):
        raise TypeError(f"{key} is no string")
    text.encode()
    return text
