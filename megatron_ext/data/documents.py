"""The documents that a dataset is made of: which files and lines they are, and their text."""

import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from megatron_ext.data.lines import BOM, JSONL_SUFFIXES, string_of
from megatron_ext.errors import DataError

WINDOW_BYTES = 64 << 20  # read at once, so that a shuffle of short lines does not become a seek for each of them
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
    """Bytes on disk; 0 of a file that is gone."""
    if document.length is not None:
        return document.length
    try:
        return document.path.stat().st_size
    except OSError:
        return 0


def texts_of(
    documents: Iterable[Document], json_key: str, limit: int | None, skipped: Counter[str] | None = None
) -> Iterator[str]:
    """The documents' exact text, up to and with the one that reaches `limit` bytes; `skipped` counts the others."""
    skipped = Counter() if skipped is None else skipped
    taken = 0
    for document, content in _contents(documents, WINDOW_BYTES if limit is None else min(limit, WINDOW_BYTES)):
        if limit is not None and taken >= limit:
            return
        if content is None:
            skipped["unreadable"] += 1
            continue
        try:
            text = _decoded(document, content, json_key)
        except UnicodeError:
            skipped["undecodable"] += 1
        except (ValueError, KeyError, TypeError, RecursionError):
            skipped["without the JSON key"] += 1
        else:
            if "\0" in text:
                skipped["binary"] += 1
            elif not text.strip():
                skipped["empty"] += 1
            else:
                taken += len(text.encode())
                yield text


def _decoded(document: Document, content: bytes, json_key: str) -> str:
    text = content.decode()
    if document.length is None:
        return text
    return string_of(text.removeprefix(BOM) if document.offset == 0 else text, json_key)


def _contents(documents: Iterable[Document], window: int) -> Iterator[tuple[Document, bytes | None]]:
    """Each document, in the order given, and its bytes; None if it cannot be read."""
    for batch in batches(documents, size_of, window):
        yield from _in_file_order(batch)


def batches[Item](items: Iterable[Item], size_of: Callable[[Item], int], least: int) -> Iterator[list[Item]]:
    """Lists of items whose sizes sum up to `least` or a little more; the last may be smaller, but is not empty."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= least:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_file_order(documents: Sequence[Document]) -> Iterator[tuple[Document, bytes | None]]:
    """The same of a few documents, each file of which is opened once and read from its beginning to its end."""
    contents: list[bytes | None] = [None] * len(documents)
    names = [str(document.path) for document in documents]
    order = sorted(range(len(documents)), key=lambda i: (names[i], documents[i].offset))
    for name, group in groupby(order, key=names.__getitem__):
        try:
            with open(name, "rb") as stream:
                for i in group:
                    stream.seek(documents[i].offset)
                    contents[i] = stream.read(-1 if documents[i].length is None else documents[i].length)
        except OSError:
            continue
    return zip(documents, contents, strict=True)
