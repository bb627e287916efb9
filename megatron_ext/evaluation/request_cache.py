"""Answers that a model has given already, so that an evaluation that was interrupted goes on where it stopped."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.ranks import gather, rank


class RequestCache:
    """A file with one answer on each line, which the first rank writes and all ranks know.

    Args:
        path: The file; a last line that was cut off is forgotten.
        model: What the answers depend on beside the question: the checkpoint, the type of its weights.
    """

    def __init__(self, path: Path, model: dict[str, Any]) -> None:
        self._path, self._model = path, model
        own: dict[str, Any] = {}
        if rank() == 0 and path.is_file():
            own = _read(path)
        self._known: dict[str, Any] = gather(own)[0]  # or the ranks might not agree on what is left to ask
        self.found = 0

    def __getitem__(self, question: tuple[Any, ...]) -> Any:
        """The answer, or None."""
        answer = self._known.get(self._key(question))
        self.found += answer is not None
        return answer

    def __setitem__(self, question: tuple[Any, ...], answer: Any) -> None:
        key = self._key(question)
        self._known[key] = answer
        if rank() == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, answer]) + "\n")

    def _key(self, question: tuple[Any, ...]) -> str:
        text = json.dumps([self._model, question], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, Any]:
    """What is there; a line that was cut off is cut out, or the next answer would be appended to it."""
    known: dict[str, Any] = {}
    whole = 0
    with path.open("rb") as file:
        for line in file:
            try:
                key, answer = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            known[key], whole = answer, whole + len(line)
    if whole < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(whole)
    return known
