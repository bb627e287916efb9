from typing import Any

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.generation import check_settings, parse, sampling
from megatron_ext.inference.sampling import Sampling


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["temperature=0.7,top_p=0.9", "do_sample=True"], {"temperature": 0.7, "top_p": 0.9, "do_sample": True}),
        (['until=["a,b", "c"]', "max_gen_toks=5"], {"until": ["a,b", "c"], "max_gen_toks": 5}),
        (["until=Q:", "num_beams=1"], {"until": "Q:", "num_beams": 1}),
        ([], {}),
    ],
)
def test_settings_are_words_as_the_harness_has_them(words: list[str], expected: dict[str, Any]) -> None:
    assert parse(words) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["temperature"], "KEY=VALUE"),
        (["temprature=1"], "not there"),
        (["num_beams=4"], "not there"),
        (["temperature=-1"], "temperature"),
        (["temperature=hot"], "hot"),
        (["temperature=1", "top_p=2"], "top-p"),
        (["max_gen_toks=0"], "max_gen_toks=0"),
        (["until=[1]"], "until"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(words)


def test_drawing_is_that_of_transformers() -> None:
    """Whose top_k is 50 where nothing is said, and which draws nothing at temperature 0."""
    assert sampling({"do_sample": True, "temperature": 0.5}) == Sampling(0.5, top_k=50)
    assert sampling({"do_sample": False, "temperature": 0.5, "top_k": 3}) == Sampling()
    check_settings({"until": None, "max_new_tokens": 3}, "task")
