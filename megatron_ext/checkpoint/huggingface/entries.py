"""Single entries of `config.json`, each of the kind that it must be."""

from math import isfinite
from typing import Any

from megatron_ext.checkpoint.huggingface.family import Config
from megatron_ext.errors import CheckpointError


def get(config: Config, name: str, default: Any = None) -> Any:
    """An entry; the default, or what it makes of the configuration, where it is missing or null.

    Raises:
        CheckpointError: There is neither.
    """
    value = config.get(name)
    if value is None:
        value = default(config) if callable(default) else default
    if value is None:
        raise CheckpointError(f"config.json has no {name!r}")
    return value


def whole(config: Config, name: str, default: Any = None) -> int:
    """An entry that is a positive whole number; see `get`."""
    value = get(config, name, default)
    if type(value) is not int or value < 1:
        raise _wrong(name, value, "a positive whole number")
    return value


def number(config: Config, name: str, default: Any = None) -> float:
    """An entry that is a number; see `get`."""
    value = get(config, name, default)
    if type(value) not in (int, float) or not isfinite(value):
        raise _wrong(name, value, "a number")
    return float(value)


def flag(config: Config, name: str, default: Any = None) -> bool:
    """An entry that is true or false; see `get`."""
    value = get(config, name, default)
    if type(value) is not bool:
        raise _wrong(name, value, "true or false")
    return value


def _wrong(name: str, value: object, legal: str) -> CheckpointError:
    return CheckpointError(f"config.json: {name!r} is of a wrong kind", got=repr(value), legal=legal)
