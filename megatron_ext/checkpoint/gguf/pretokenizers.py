"""How llama.cpp's byte-level vocabularies split a text before they merge bytes, as `tokenizer.ggml.pre` names it.

Each kind is what its models' own `tokenizer.json` says, so that it is written when a file is read and recognised when
one is made. Names: llama.cpp's `llama-vocab.cpp`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = "|".join(_CASED) + r"|\p{N}" + _SLASHES
_GPT4O = "|".join(f"{case}{_CASELESS}?" for case in _CASED) + r"|\p{N}{1,3}" + _SLASHES


@dataclass(frozen=True)
class PreTokenizer:
    """One way to split.

    Attributes:
        steps: The entries of `tokenizer.json`'s `pre_tokenizer`, in order, without those that change no token.
        ignore_merges: Whether a piece that is a token is taken whole, whatever the merges say.
        begins: Whether a text begins with the BOS token where the file does not say.
    """

    steps: tuple[tuple[str, Any], ...]
    ignore_merges: bool = False
    begins: bool = False

    def to_json(self) -> dict[str, Any]:
        """The entry `pre_tokenizer`."""
        made = [_STEPS[kind](value) for kind, value in self.steps]
        return made[0] if len(made) == 1 else {"type": "Sequence", "pretokenizers": made}


_BYTES = ("bytes", True)  # and words are split by GPT-2's own expression
_STEPS = {
    "bytes": lambda words: {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words,
    },
    "digits": lambda single: {"type": "Digits", "individual_digits": single},
    "split": lambda pattern: {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    },
}  # fmt: skip


def _split(pattern: str, ignore_merges: bool = False, begins: bool = False) -> PreTokenizer:
    return PreTokenizer((("split", pattern), ("bytes", False)), ignore_merges, begins)


_GPT2 = PreTokenizer((_BYTES,))
_DIGITS = PreTokenizer((("digits", True), _BYTES))
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": _GPT2, "phi-2": _GPT2, "mpt": _GPT2, "olmo": _GPT2, "jais": _GPT2, "exaone4": _GPT2, "mellum": _GPT2,
    "smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS, "command-r": _DIGITS, "codeshell": _DIGITS,
    "exaone": _DIGITS, "minerva-7b": _DIGITS,
    "llama-bpe": _split(_LLAMA3, True, True), "llama3": _split(_LLAMA3, True, True),
    "llama-v3": _split(_LLAMA3, True, True), "falcon3": _split(_LLAMA3, True, True),
    "smaug-bpe": _split(_LLAMA3), "dbrx": _split(_LLAMA3), "glm4": _split(_LLAMA3, True),
    "qwen2": _split(_QWEN2), "deepseek-r1-qwen": _split(_QWEN2), "megrez": _split(_QWEN2), "stablelm2": _split(_QWEN2),
    "tekken": _split(_TEKKEN, True, True),
    "gpt-4o": _split(_GPT4O), "llama4": _split(_GPT4O),
}  # fmt: skip
"""By name; of those that are alike, the first is written."""


def recognised(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of what a `tokenizer.json` does; None if it has none."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    ignore = bool(tokenizer["model"].get("ignore_merges"))
    for name, known in PRE_TOKENIZERS.items():
        if list(known.steps) == steps and known.ignore_merges == ignore:
            return name
    return None


def _steps(described: Any) -> Sequence[tuple[str, Any]]:
    """The steps of an entry `pre_tokenizer`, as the table has them."""
    kind = described.get("type") if isinstance(described, dict) else None
    if kind == "Sequence":
        return [step for each in described["pretokenizers"] for step in _steps(each)]
    if kind == "ByteLevel" and not described.get("add_prefix_space", True):
        return [("bytes", described.get("use_regex", True))]
    if kind == "Digits":
        return [("digits", described.get("individual_digits", False))]
    if kind == "Split" and described.get("behavior") == "Isolated" and not described.get("invert"):
        return [("split", described.get("pattern", {}).get("Regex"))]
    return [("unknown", described)]
