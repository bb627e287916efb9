"""Which part of a sequence each context-parallel rank has."""

import torch
from jaxtyping import Shaped
from torch import Tensor


def zigzag_split(sequence: Shaped[Tensor, "s *rest"], rank: int, ranks: int) -> Shaped[Tensor, "l *rest"]:
    """The tokens of one of so many ranks: of 2 `ranks` pieces the `rank`-th from the front, and that from the back.

    So all ranks have as much to do under a causal mask. It is what Megatron's `get_batch_on_this_cp_rank` does to a
    batch.
    """
    if ranks == 1:
        return sequence
    pieces = sequence.chunk(2 * ranks)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])
