"""Which part of a sequence each context-parallel rank has, and the whole of it from the parts.

Of 2R equal pieces rank r of R has the r-th from the front and the r-th from the back, so that all ranks have as much to
do under a causal mask. It is what Megatron's `get_batch_on_this_cp_rank` does to a batch.
"""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


def zigzag_split(sequence: Shaped[Tensor, "..."], rank: int, ranks: int, dim: int = 0) -> Shaped[Tensor, "..."]:
    """The tokens of one of so many ranks, which lie in dimension `dim`."""
    if ranks == 1:
        return sequence
    pieces = sequence.chunk(2 * ranks, dim)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]], dim)


def zigzag_join(parts: Shaped[Tensor, "s *rest"], ranks: int) -> Shaped[Tensor, "s *rest"]:
    """The sequence in order, from the parts of all ranks one after another."""
    if ranks == 1:
        return parts
    pieces = parts.chunk(2 * ranks)
    return torch.cat([*pieces[::2], *reversed(pieces[1::2])])


def zigzag_of_documents(borders: Int[Tensor, "b d"], length: int, rank: int, ranks: int) -> Int[Tensor, "b l"]:
    """The positions of one rank's tokens where each document in a row is split for itself, as Transformer Engine does.

    Args:
        borders: Where the documents of each row begin, and at last its end, `length`; a row with fewer of them than
            others repeats the end. The length of each document is a multiple of 2 `ranks`.
        length: Of a row.
        rank: Whose tokens.
        ranks: How many share a row.
    """
    position = torch.arange(length, device=borders.device).expand(len(borders), -1).contiguous()
    starts, ends = borders[:, :-1].contiguous(), borders[:, 1:].contiguous()
    document = torch.searchsorted(ends, position.to(ends.dtype), right=True)
    start, end = starts.gather(1, document), ends.gather(1, document)
    piece = (position - start) * 2 * ranks // (end - start)
    elsewhere = (piece != rank) & (piece != 2 * ranks - 1 - rank)
    # Own tokens first, in order. Their number is known, so that a GPU need not be asked.
    return elsewhere.int().argsort(dim=1, stable=True)[:, : length // ranks]
