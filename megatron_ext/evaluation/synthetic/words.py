"""Names, words and numbers out of a random generator; nothing that has to be downloaded."""

from random import Random

CONSONANTS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "st", "tr")
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "io")
NOISE = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
    "The river runs to the sea.", "A door stands open.", "Bread is on the table.", "The train leaves at noon.",
    "Snow fell in the night.", "The lamp is lit.", "Someone plays the piano.",
)  # fmt: skip


def word(rng: Random) -> str:
    """A word of three syllables, one of three million."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(3))


def different(rng: Random, count: int) -> list[str]:
    """So many different words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[word(rng)] = None
    return list(found)


def names(rng: Random, count: int) -> list[str]:
    """So many different names, each a first and a last one."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"{word(rng).capitalize()} {word(rng).capitalize()}"] = None
    return list(found)


def number(rng: Random) -> str:
    """Seven digits, as a telephone number has."""
    return f"{rng.randrange(100, 1000)}-{rng.randrange(10_000):04d}"


def hidden(rng: Random, size: int, sentences: list[str]) -> str:
    """Sentences in their order, anywhere between `size` others that say nothing to the point."""
    text = [rng.choice(NOISE) for _ in range(size)]
    places = sorted(rng.randrange(size + 1) for _ in sentences)
    for place, sentence in reversed(list(zip(places, sentences, strict=True))):
        text.insert(place, sentence)
    return " ".join(text)
