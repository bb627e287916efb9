"""The one place where Megatron hands out every scalar it measures: its TensorBoard writer."""

from collections.abc import Callable
from typing import Any

from megatron_ext.platform.replacements import replace


def divert_scalars(wrap: Callable[[Any], Any]) -> Any:
    """Put `wrap(writer)` in the place of Megatron's TensorBoard writer (`None` where the user asked for none).

    Megatron has no other door for the loss, gradient norm and learning rate of a step in full precision.

    Returns:
        The new writer.
    """
    import megatron.training.global_vars as global_vars

    writer = wrap(global_vars._GLOBAL_TENSORBOARD_WRITER)
    replace(global_vars, "_GLOBAL_TENSORBOARD_WRITER", writer, "every scalar also goes to metrics.jsonl (everywhere)")
    return writer
