"""The documents that a dataset is made of: which files and lines they are, and their text."""

import json
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_ext.errors import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
# Left out of the default corpus: other people's packages, what Linux distributions leave out, and generated tables.
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
STDLIB_GENERATED = "_sysconfigdata"  # how this Python was built: another text on each machine


class Document(NamedTuple):
    """Where one document lies: a whole file, or (`length` given) one line of a JSONL file; offsets in bytes."""

    path: Path
    offset: int = 0
    length: int | None = None


def find_documents(inputs: Sequence[Path] | None) -> list[Document]:
    """Every document in a fixed order, each file once; file contents are looked at only to split JSONL.

    Args:
        inputs: Files and directories (read recursively, hidden entries left out); None is Python's standard library.

    Raises:
        DataError: A path is missing.
    """
    files = _standard_library() if inputs is None else [file for path in inputs for file in _files(path)]
    documents: list[Document] = []
    for file in dict.fromkeys(file.resolve() for file in files):
        documents.extend(_lines(file) if file.suffix in JSONL_SUFFIXES else [Document(file)])
    return documents


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError("no such file or directory", got=f"--input {path}", legal="an existing file or directory")
    found = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
    return [found[name] for name in sorted(found) if not any(part.startswith(".") for part in name.parts)]


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = {file.relative_to(root): file for file in root.rglob("*.py") if file.is_file()}
    return [
        found[name]
        for name in sorted(found)
        if STDLIB_LEFT_OUT.isdisjoint(name.parts) and not name.name.startswith(STDLIB_GENERATED)
    ]


def _lines(file: Path) -> Iterator[Document]:
    offset = 0
    with file.open("rb") as stream:
        for line in stream:
            if line.strip():
                yield Document(file, offset, len(line))
            offset += len(line)


def size_of(document: Document) -> int:
    """Bytes on disk."""
    return document.path.stat().st_size if document.length is None else document.length


def texts_of(
    documents: Iterable[Document], json_key: str, limit: int | None, skipped: Counter[str] | None = None
) -> Iterator[str]:
    """The documents' exact text, up to and with the one that reaches `limit` bytes; `skipped` counts the others."""
    skipped = Counter() if skipped is None else skipped
    taken = 0
    for document in documents:
        if limit is not None and taken >= limit:
            return
        try:
            text = _read(document, json_key)
            size = len(text.encode())  # a JSON escape can spell half a surrogate pair
        except UnicodeError:
            skipped["undecodable"] += 1
        except OSError:
            skipped["unreadable"] += 1
        except (ValueError, KeyError, TypeError):
            skipped["without the JSON key"] += 1
        else:
            if "\0" in text:
                skipped["binary"] += 1
            elif not text.strip():
                skipped["empty"] += 1
            else:
                taken += size
                yield text


def _read(document: Document, json_key: str) -> str:
    if document.length is None:
        return document.path.read_bytes().decode()
    with document.path.open("rb") as stream:
        stream.seek(document.offset)
        text = json.loads(stream.read(document.length))[json_key]
    if not isinstance(text, str):
        raise TypeError(json_key)
    return text
