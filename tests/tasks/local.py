"""Reads `questions.jsonl` for the tasks beside it."""

import json
import os
import signal
from pathlib import Path
from random import Random
from typing import Any

import datasets

SENT: list[signal.Signals] = []


def many(**_: Any) -> dict[str, datasets.Dataset]:
    """Forty questions of random words, with four choices each."""
    draw = Random(5)
    words = (Path(__file__).parent / "questions.jsonl").read_text().split()
    asked = [
        {"question": " ".join(draw.sample(words, 4)), "choices": [" ".join(draw.sample(words, 2)) for _ in range(4)]}
        for _ in range(40)
    ]
    return {"test": datasets.Dataset.from_list([each | {"answer": i % 4} for i, each in enumerate(asked)])}


def questions(**_: Any) -> dict[str, datasets.Dataset]:
    lines = (Path(__file__).parent / "questions.jsonl").read_text().splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def question_with_a_signal(doc: dict[str, Any]) -> str:
    """The question; the first that the last rank is asked asks the program to stop."""
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    if last and not SENT and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # not while tasks are loaded
        SENT.append(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    return doc["question"]
