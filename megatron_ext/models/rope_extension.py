"""A trained model at a longer sequence than it was made for: what that asks of its positions.

A model without positions (Mamba-2, and hybrids whose attention has none) needs nothing. Rotary positions were trained
up to some angle per channel, and the base must grow with the sequence; which base is the user's to say.
"""

from argparse import Namespace

from megatron_ext.errors import ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION


def ntk_base(arch: Architecture, length: int) -> int:
    """The RoPE base at which the slowest channel turns as far over `length` tokens as it did over the trained ones.

    base * s^(d / (d - 2)) for s times the length and d rotated channels of a head ("NTK-aware" interpolation,
    arXiv 2309.00071, section 3.1).
    """
    rotated = int(arch.kv_channels * arch.rotary_percent)
    scale = length / arch.max_position_embeddings
    return round(arch.rotary_base * scale ** (rotated / max(2, rotated - 2)))


def extension(arch: Architecture, given: Namespace) -> list[str]:
    """Flags that go with a sequence that is longer than the model's, for a model that is read from a checkpoint.

    Args:
        arch: The model on disk.
        given: The command line's `seq_length`, `max_position_embeddings`, `rotary_base` and `use_rope_scaling`.

    Raises:
        ConfigError: Its attention has rotary positions, and nothing says how they are to reach further.
    """
    length = given.seq_length or 0
    if given.max_position_embeddings is not None or length <= arch.max_position_embeddings:
        return []
    rotary = ATTENTION in arch.pattern and arch.position_embedding_type == "rope"
    if rotary and given.rotary_base is None and not given.use_rope_scaling:
        raise ConfigError(
            "the model's rotary positions do not reach as far as the sequence",
            got=f"--seq-length {length}, trained on {arch.max_position_embeddings} with base {arch.rotary_base}",
            legal=f"--rotary-base {ntk_base(arch, length)} (NTK-aware), another base, or --use-rope-scaling; "
            f"--rotary-base {arch.rotary_base} keeps it",
        )
    return ["--max-position-embeddings", str(length)]
