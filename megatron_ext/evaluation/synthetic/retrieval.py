"""Finding one thing among many: Phonebook, and needles in a haystack."""

from random import Random

from megatron_ext.evaluation.synthetic import words
from megatron_ext.evaluation.synthetic.suite import TextSuite

PHONEBOOK = "An Empirical Study of Mamba-based Language Models, arXiv 2406.07887"
RULER = "RULER, arXiv 2404.06654"
KEYS, VALUES = 4, 4


def _book(rng: Random, size: int) -> tuple[dict[str, str], list[str]]:
    """Names and numbers, and three of the names: two for examples, one to be asked for."""
    book = {name: words.number(rng) for name in words.names(rng, size)}
    return book, rng.sample(list(book), 3)


def _phonebook(rng: Random, size: int) -> tuple[str, str]:
    book, (first, second, asked) = _book(rng, size)
    lines = [f"{name}: {number}" for name, number in book.items()]
    shots = [f"The number of {name} is {book[name]}" for name in (first, second)]
    return "\n".join(["Telephone book", *lines, "", *shots, f"The number of {asked} is"]), f" {book[asked]}"


def _phonebook_reversed(rng: Random, size: int) -> tuple[str, str]:
    book, (first, second, asked) = _book(rng, size)
    lines = [f"{name}: {number}" for name, number in book.items()]
    names = f"Numbers to remember: {first}, {second}, {asked}"
    shots = [f"The number of {name} is {book[name]}" for name in (first, second)]
    return "\n".join([names, "Telephone book", *lines, "", *shots, f"The number of {asked} is"]), f" {book[asked]}"


def _needle_text(key: str, value: str) -> str:
    return f"The special number of {key} is {value}."


def _needle(rng: Random, size: int) -> tuple[str, str]:
    key, value = words.word(rng), words.number(rng)
    text = words.hidden(rng, size, [_needle_text(key, value)])
    return f"{text}\nQuestion: what is the special number of {key}?\nAnswer: it is", f" {value}"


def _multi_key(rng: Random, size: int) -> tuple[str, str]:
    keys = words.different(rng, KEYS)
    values = {key: words.number(rng) for key in keys}
    asked = rng.choice(keys)
    text = words.hidden(rng, size, [_needle_text(key, value) for key, value in values.items()])
    return f"{text}\nQuestion: what is the special number of {asked}?\nAnswer: it is", f" {values[asked]}"


def _multi_value(rng: Random, size: int) -> tuple[str, str]:
    key = words.word(rng)
    values = [words.number(rng) for _ in range(VALUES)]
    text = words.hidden(rng, size, [_needle_text(key, value) for value in values])
    question = f"what are all special numbers of {key}, in the order of the text?"
    return f"{text}\nQuestion: {question}\nAnswer: they are", f" {', '.join(values)}"


phonebook = TextSuite("phonebook", PHONEBOOK, _phonebook, least=3)
phonebook_reversed = TextSuite("phonebook_reversed", PHONEBOOK, _phonebook_reversed, least=3)
needle = TextSuite("needle", RULER, _needle)
multi_key = TextSuite("multi_key", RULER, _multi_key)
multi_value = TextSuite("multi_value", RULER, _multi_value)
