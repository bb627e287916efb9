"""Each suite's questions are answered by a solver that reads nothing but the question."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.questions import Sample, load_task
from megatron_ext.evaluation.synthetic import SUITES, Suite, curves
from megatron_ext.inference.loglikelihood import Loglikelihood


def byte_pairs() -> PreTrainedTokenizerFast:
    """As large models have them: words with their spaces, and a token before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = " The special number of name is 123-4567. Let x = y. Question: Answer: Words: Telephone book"
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(alphabet), special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator([text] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


class Megatron:
    """Megatron's interface; a token is a character, and the last one the end of a document."""

    vocab_size, eod = 129, 128

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode("ascii"))

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return bytes(tokens).decode()


TOKENIZERS = {"byte pairs": byte_pairs(), "Megatron's": Megatron()}


def names_and_numbers(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+ \w+): (\d{3}-\d{4})$", text, flags=re.MULTILINE))


def solve_phonebook(text: str) -> str:
    (asked,) = re.findall(r"The number of (\w+ \w+) is$", text)
    return f" {names_and_numbers(text)[asked]}"


def solve_needle(text: str) -> str:
    (asked,) = re.findall(r"Question: what is the special number of (\w+)\?\nAnswer: it is$", text)
    (value,) = re.findall(rf"The special number of {asked} is (\d{{3}}-\d{{4}})\.", text)
    return f" {value}"


def solve_multi_value(text: str) -> str:
    (asked,) = re.findall(r"Question: what are all special numbers of (\w+), in", text)
    return " " + ", ".join(re.findall(rf"The special number of {asked} is (\d{{3}}-\d{{4}})\.", text))


def solve_variable_tracking(text: str) -> str:
    (value,) = re.findall(r"Question: which variables have the value (\S+), in", text)
    held: dict[str, str] = {}
    for left, right in re.findall(r"Let (\w+) = ([\w-]+)\.", text):
        held[left] = held.get(right, right)
    return " " + ", ".join(name for name, own in held.items() if own == value)


def solve_common_words(text: str) -> str:
    (listed,) = re.findall(r"Words: (.*)\nQuestion", text)
    counted = Counter(listed.split()).most_common(4)
    assert len({count for _, count in counted}) == len(counted) == 4  # no two of them are equally frequent
    return " " + ", ".join(word for word, _ in counted[:3])


TEXT: dict[str, Callable[[str], str]] = {
    "phonebook": solve_phonebook, "phonebook_reversed": solve_phonebook, "needle": solve_needle,
    "multi_key": solve_needle, "multi_value": solve_multi_value, "variable_tracking": solve_variable_tracking,
    "common_words": solve_common_words,
}  # fmt: skip


def solve_copying(prompt: Sequence[int]) -> list[int]:
    assert prompt.index(prompt[0], 1) == len(prompt) - 1
    return list(prompt[1:-1])


def solve_induction(prompt: Sequence[int]) -> list[int]:
    return [prompt[prompt.index(prompt[-1]) + 1]]


TOKENS = {"copying": solve_copying, "induction": solve_induction}


def take(suite: Suite, tokenizer: Any, length: int, seed: int = 0, count: int = 3) -> list[Sample]:
    return list(islice(suite.samples(tokenizer, length, seed), count))


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=list(TOKENIZERS))
@pytest.mark.parametrize("name", SUITES)
def test_an_oracle_solves_every_question(name: str, tokenizer: Any) -> None:
    # Making a question of 131,072 tokens takes seconds: one suite of either kind.
    longest = 131_072 if name in ("phonebook", "induction") and tokenizer is TOKENIZERS["byte pairs"] else 8192
    for length, count in ((512, 3), (2048, 3), (longest, 1)):
        for sample in take(SUITES[name], tokenizer, length, count=count):
            assert length - 160 <= len(sample.prompt) + len(sample.answer) <= length  # it fills its context
            if name in TOKENS:
                assert TOKENS[name](sample.prompt) == sample.answer
                continue
            text = tokenizer.decode(sample.prompt, skip_special_tokens=True)
            assert tokenizer.decode(sample.answer) == TEXT[name](text)
            whole = tokenizer.decode([*sample.prompt, *sample.answer], skip_special_tokens=True)
            assert whole == text + TEXT[name](text)


@pytest.mark.parametrize("name", SUITES)
def test_a_seed_gives_the_same_questions_and_another_gives_others(name: str) -> None:
    tokenizer = TOKENIZERS["byte pairs"]
    questions = take(SUITES[name], tokenizer, 500)
    assert take(SUITES[name], tokenizer, 500, count=2) == questions[:2]
    assert take(SUITES[name], tokenizer, 500, seed=1) != questions
    assert len({str(question) for question in questions}) == 3


def test_questions_are_the_same_tomorrow() -> None:
    """A change of a suite makes results incomparable: it must be meant."""
    (sample,) = take(SUITES["phonebook"], TOKENIZERS["Megatron's"], 330, count=1)
    text = bytes([*sample.prompt, *sample.answer]).decode()
    assert text == PHONEBOOK


PHONEBOOK = """\
Telephone book
Buviofio Zekasa: 943-8305
Lastomo Bogube: 164-5147
Drotrifo Gubrotea: 564-4155
Peadevea Tradavio: 656-2916
Zeatopo Tatreapai: 672-6633
Bramatru Kolitrio: 911-2633

The number of Drotrifo Gubrotea is 564-4155
The number of Lastomo Bogube is 164-5147
The number of Buviofio Zekasa is 943-8305"""


def test_the_reversed_phonebook_asks_first() -> None:
    tokenizer = TOKENIZERS["Megatron's"]
    (sample,) = take(SUITES["phonebook_reversed"], tokenizer, 600, count=1)
    text = tokenizer.decode(sample.prompt)
    asked = re.findall(r"The number of (\w+ \w+) is", text)
    assert text.startswith(f"Numbers to remember: {', '.join(asked)}\nTelephone book\n")


@pytest.mark.parametrize("name", SUITES)
def test_what_is_too_short_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no question so short"):
        take(SUITES[name], TOKENIZERS["byte pairs"], 3)


def test_suites_are_tasks_of_pruning() -> None:
    samples = list(load_task("megatron_ext.evaluation.synthetic:needle")(Megatron(), 300, 1))
    assert len(samples) == 50
    assert samples[:2] == take(SUITES["needle"], Megatron(), 300, seed=1, count=2)


def test_special_tokens_are_not_drawn() -> None:
    (sample,) = take(SUITES["copying"], TOKENIZERS["byte pairs"], 4000, count=1)
    assert 0 not in sample.prompt
    assert set(sample.prompt) > set(range(1, 200))


def test_accuracy_counts_answers_and_tokens() -> None:
    flags = ([True, True], [True, False], [False, False, False, True])
    scores = [Loglikelihood(torch.zeros(len(own)), torch.tensor(own)) for own in flags]
    assert curves.accuracy(scores) == {"accuracy": 1 / 3, "token_accuracy": 4 / 8, "samples": 3}


def test_names_and_lengths() -> None:
    assert [suite.name for suite in curves.suites(["all"])] == list(SUITES)
    assert [suite.name for suite in curves.suites(["needle", "needle"])] == ["needle"]
    with pytest.raises(ConfigError, match="no such synthetic suite"):
        curves.suites(["needel"])


def test_each_suite_is_measured_at_each_length_that_it_has_questions_of() -> None:
    suites, tokenizer = [SUITES["needle"], SUITES["variable_tracking"]], Megatron()
    found = [(suite.name, length) for suite, length in curves.cells(suites, None, 1000, tokenizer)]
    assert found == [("needle", 256), ("needle", 512), ("variable_tracking", 512)]
    found = [(suite.name, length) for suite, length in curves.cells(suites, [900, 600, 900], 1, tokenizer)]
    assert found == [(name, length) for name in ("needle", "variable_tracking") for length in (600, 900)]
    assert [length for _, length in curves.cells(suites[:1], None, 2**20, tokenizer)] == [2**k for k in range(8, 18)]
    assert [length for _, length in curves.cells(suites[:1], None, 200, tokenizer)] == [200]
    with pytest.raises(ConfigError, match="no question so short"):
        curves.cells(suites, [256, 600], 1000, tokenizer)


def test_the_picture_is_drawn(tmp_path: Any) -> None:
    cells = {str(2**k): {"accuracy": 1 / k, "token_accuracy": 1.5 / k} for k in range(8, 18)}
    for count in (1, 4, 9):
        curves.plot(dict.fromkeys(list(SUITES)[:count], cells), tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").stat().st_size > 8000
