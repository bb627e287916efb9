"""Questions about long contexts, made from a seed: nothing is downloaded, any tokenizer serves, any length fits.

Each suite is a task in the sense of `megatron_ext.pruning.tasks` too: `megatron_ext.evaluation.synthetic:phonebook`.
"""

from megatron_ext.evaluation.synthetic.aggregation import common_words, variable_tracking
from megatron_ext.evaluation.synthetic.recall import copying, induction
from megatron_ext.evaluation.synthetic.retrieval import (
    multi_key,
    multi_value,
    needle,
    phonebook,
    phonebook_reversed,
)
from megatron_ext.evaluation.synthetic.suite import Suite

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        phonebook, phonebook_reversed, needle, multi_key, multi_value, variable_tracking, common_words, copying,
        induction,
    )
}  # fmt: skip

__all__ = [
    "SUITES", "Suite", "common_words", "copying", "induction", "multi_key", "multi_value", "needle", "phonebook",
    "phonebook_reversed", "variable_tracking",
]  # fmt: skip
