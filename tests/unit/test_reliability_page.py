"""The tables of docs/reliability.md are what the results say, and a part that has not been run says so."""

import json
from typing import Any

import pytest

from benchmarks.reliability import page


def test_the_page_is_up_to_date() -> None:
    """Otherwise: python -m benchmarks.reliability.page."""
    text = page.PAGE.read_text()
    assert page.page(text, json.loads(page.RESULTS.read_text())) == text


def test_what_has_not_been_run_says_so() -> None:
    for part in page.TABLES:
        assert page.UNKNOWN in page.table(part, {"parts": {}}).splitlines()[2]


KILLED = {"kills": 200, "inside a write": 9, "ends": 40, "lost": 0, "wrong": 0, "blocked": 0, "different": 0} | {
    "left over": 0
}


@pytest.mark.parametrize(
    ("part", "good", "bad"),
    [
        ("kills", KILLED, {"lost": 1}),
        ("kills", KILLED, {"wrong": 2}),
        ("kills", KILLED, {"blocked": 1}),
        ("corruptions", {"verified, unnamed": 0, "unverified": 0, "refused, unnamed": 0, "WRONG": 0}, {"WRONG": 1}),
        ("resumes", {"difference": 0.0, "other tensors": 0}, {"difference": 1e-9}),
        ("resumes", {"difference": 0.0, "other tensors": 0}, {"other tensors": 1}),
        ("resumes", {"difference": 0.0, "other tensors": 0}, {"difference": None, "message": "refused"}),
        ("reshards", {"cells": {"1": {"outcome": "goes on"}}}, {"cells": {"1": {"outcome": "failed"}}}),
        ("memory", {"growth": 0.001, "more descriptors": 0}, {"growth": 0.02}),
        ("memory", {"growth": 0.001, "more descriptors": 0}, {"more descriptors": 1}),
        ("payloads", {"payloads": {"x": {"executed": [], "harmful": True}}},
         {"payloads": {"x": {"executed": ["verify"], "harmful": True}}}),
        ("payloads", {"payloads": {"x": {"executed": [], "harmful": True}}},
         {"payloads": {"x": {"executed": [], "harmful": False}}}),
        ("faults", {"good": True}, {"good": False}),
        ("faults", {"good": True}, {"good": None}),
    ],
)  # fmt: skip
def test_what_is_wrong_is_called_so(part: str, good: dict[str, Any], bad: dict[str, Any]) -> None:
    assert page.verdict(part, good) == page.GOOD
    assert page.verdict(part, good | bad) != page.GOOD
