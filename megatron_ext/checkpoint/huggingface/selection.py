"""Which files of a directory hold its weights: those that transformers reads, in its order (`modeling_utils.py`)."""

import logging
from pathlib import Path

from megatron_ext.checkpoint.huggingface import pickled, shards
from megatron_ext.checkpoint.huggingface.family import Config
from megatron_ext.checkpoint.huggingface.pickled import Pickled
from megatron_ext.checkpoint.huggingface.shards import Shards
from megatron_ext.errors import CheckpointError

ORDER = (shards.SINGLE, shards.INDEX, pickled.NAME, pickled.INDEX)
NAMED = "transformers_weights"
logger = logging.getLogger(__name__)


def weights_of(directory: Path, config: Config) -> Shards | Pickled:
    """The weights of a directory; says so where there are others beside them.

    Raises:
        CheckpointError: There are none, or they are missing or damaged.
    """
    named = config.get(NAMED)
    if named is not None and not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"config.json: {NAMED!r} names no safetensors", got=named)
    beside = sorted(path.name for ending in ("*.safetensors", "*.bin") for path in directory.glob(ending))
    taken = str(named) if named is not None else next((name for name in ORDER if (directory / name).is_file()), None)
    if taken is None:
        raise CheckpointError(
            "no weights under a name that transformers reads", got=", ".join(beside) or directory,
            legal=", ".join(ORDER),
        )  # fmt: skip
    found = Pickled(directory, taken) if taken in (pickled.NAME, pickled.INDEX) else Shards(directory, taken)
    read = {entry.path.name for entry in found.entries.values()} | {taken, "training_args.bin"}
    if others := [name for name in (*beside, *ORDER) if name not in read and (directory / name).is_file()]:
        told = ", ".join(dict.fromkeys(others[:3])) + (" and more" if len(others) > 3 else "")
        logger.warning(f"{directory}: reading {taken}, as transformers does, and not {told}")
    return found
