import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.questions import MultipleChoice, Sample, accuracy, load_task, texts
from megatron_ext.evaluation.synthetic import Choices, copying, copying_choice, needle_choice, phonebook_choice


class Letters:
    """Megatron's interface; a token is a character, and the last one the end of a document."""

    vocab_size, eod = 129, 128

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode("ascii"))


SHORT, LONG = Sample([1, 2], [3]), Sample([1, 2], [3, 4, 5])


def test_the_most_probable_choice_is_the_answer():
    questions = [
        MultipleChoice([SHORT, LONG], 0),
        MultipleChoice([SHORT, LONG], 1),
        MultipleChoice([SHORT, LONG], 1, lengths=[4.0, 5.0]),  # as characters
        Sample([1], [2]),
    ]
    # Nats. As a whole short beats long, by its tokens long beats short (-1.0 against -2.0), by characters it does not.
    scores = [(-2.0, False), (-3.0, False)] * 3 + [(-9.0, True)]
    assert accuracy(questions, scores) == {"acc": 2 / 4, "acc_norm": 2 / 4}
    scores[4:6] = [(-2.0, False), (-2.4, False)]
    assert accuracy(questions, scores) == {"acc": 2 / 4, "acc_norm": 3 / 4}


def test_all_texts_are_scored_in_order():
    questions = [Sample([7], [8]), MultipleChoice([SHORT, LONG], 0), Sample([9], [9])]
    assert texts(questions, 4) == [Sample([7], [8]), SHORT, LONG, Sample([9], [9])]


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "no questions"), ([Sample([], [1])], "question 0 .* not fit"), ([SHORT, Sample([1], [])], "question 1"),
        ([Sample([1] * 4, [1, 2])], "4 \\+ 2 tokens"), ([MultipleChoice([SHORT], 0)], "1 choices"),
        ([MultipleChoice([SHORT, LONG], 2)], "number 2 is right"),
        ([MultipleChoice([SHORT, LONG], 0, lengths=[1.0])], "1 lengths"),
    ],
)  # fmt: skip
def test_questions_that_cannot_be_asked_are_refused(questions, message):
    with pytest.raises(ConfigError, match=message):
        texts(questions, 4)


@pytest.mark.parametrize("choice", [copying_choice, phonebook_choice, needle_choice, Choices(copying, 4)])
def test_suites_are_choices_whose_right_one_is_their_own_answer(choice):
    questions = choice(Letters(), 400, 3)
    assert len(questions) == 100
    own = dict.fromkeys((tuple(sample.prompt), tuple(sample.answer)) for sample, _ in zip(
        choice.suite.samples(Letters(), 400, 3), range(100), strict=False
    ))  # fmt: skip
    for question in questions:
        assert len({tuple(text.answer) for text in question.choices}) == choice.choices
        assert len({tuple(text.prompt) for text in question.choices}) == 1
        assert len({len(text.answer) for text in question.choices}) == 1
        right = question.choices[question.right]
        assert (tuple(right.prompt), tuple(right.answer)) in own
    places = [question.right for question in questions]
    assert all(places.count(i) > 50 / choice.choices for i in range(choice.choices))  # a model cannot guess it
    assert choice(Letters(), 400, 3) == questions != choice(Letters(), 400, 4)


def test_the_command_line_names_them():
    assert load_task("megatron_ext.evaluation.synthetic:phonebook_choice") is phonebook_choice
