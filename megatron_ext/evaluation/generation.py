"""Settings of generation as tasks of lm-evaluation-harness have them, from the command line or a task's file."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from megatron_ext.errors import ConfigError
from megatron_ext.inference.sampling import Sampling

NEW_TOKENS = 256  # where a task does not say; as for the harness's own models
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
KNOWN = ("until", "do_sample", "temperature", "top_k", "top_p", *LENGTHS)
NEUTRAL = {"num_beams": (1,), "repetition_penalty": (1,), "length_penalty": (1,), "use_cache": (True, False)}
TOP_K = 50  # of transformers where nothing is said, which the harness's tasks are written for
WORDS = {"True": True, "False": False, "None": None}


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Settings from `KEY=VALUE` words, several in one with commas between them as the harness has it.

    Raises:
        ConfigError: A word is none, or a setting is not known or has a value that it cannot have.
    """
    found: dict[str, Any] = {}
    if not words:
        return found
    for word in re.split(r"[\s,]+(?=\w+=)", " ".join(words)):
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError("--gen-kwargs", got=word, legal="KEY=VALUE, such as temperature=0.7")
        try:
            found[key] = WORDS[value] if value in WORDS else json.loads(value)
        except ValueError:
            found[key] = value
    check_settings(found, "--gen-kwargs")
    return found


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings that would be ignored.

    Raises:
        ConfigError: One is not known, or has a value that it cannot have.
    """
    for key, value in settings.items():
        if key not in KNOWN and value not in NEUTRAL.get(key, ()):
            raise ConfigError(
                "a setting of generation that is not there", got=f"{where}: {key}={value}", legal=", ".join(KNOWN)
            )
    try:
        sampling(dict(settings))
        until, length = settings.get("until"), normalized(settings)["max_gen_toks"]
        texts = [until] if isinstance(until, str) else until or []
        if length < 1 or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"max_gen_toks={length}" if length < 1 else f"until={until}")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"settings of generation: {error}", got=f"{where}: {dict(settings)}") from error


def normalized(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the harness's defaults: `temperature`, `do_sample`, `until` and `max_gen_toks` are there."""
    return {"temperature": 0.0, **normalize_gen_kwargs(dict(settings), NEW_TOKENS)}


def sampling(settings: Mapping[str, Any]) -> Sampling:
    """How tokens are chosen.

    Raises:
        ConfigError: A value out of its range.
    """
    values = normalized(settings)
    if not values["temperature"] > 0:
        return Sampling(float(values["temperature"]))
    return Sampling(
        float(values["temperature"]), int(values.get("top_k", TOP_K)), float(values.get("top_p", 1.0))
    )  # fmt: skip
