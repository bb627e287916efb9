"""Questions about long contexts, made from a seed: nothing is downloaded, any tokenizer serves, any length fits.

Each suite is a task in the sense of `megatron_ext.evaluation.questions` too:
`megatron_ext.evaluation.synthetic:phonebook`.
Some are there as choices as well, compared by likelihood: `megatron_ext.evaluation.synthetic:phonebook_choice`.

`suite` is what a suite is; the suites lie in `retrieval`, `recall` and `aggregation`, their words and numbers come from
`words`. `choice` makes choices of them, and `curves` the accuracy over length.
"""

from megatron_ext.evaluation.synthetic.aggregation import common_words, variable_tracking
from megatron_ext.evaluation.synthetic.choice import Choices
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

phonebook_choice, needle_choice, copying_choice, induction_choice = map(
    Choices, (phonebook, needle, copying, induction)
)

__all__ = [
    "SUITES", "Choices", "Suite", "common_words", "copying", "copying_choice", "induction", "induction_choice",
    "multi_key", "multi_value", "needle", "needle_choice", "phonebook", "phonebook_choice", "phonebook_reversed",
    "variable_tracking",
]  # fmt: skip
