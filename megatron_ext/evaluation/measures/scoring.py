"""Log-likelihoods of many texts, with progress."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ext.inference.loglikelihood import Loglikelihood, LoglikelihoodRequest
from megatron_ext.reports.progress import Progress

if TYPE_CHECKING:
    from megatron_ext.inference.sharded import ShardedModel


def scored(
    model: "ShardedModel", passages: Sequence[LoglikelihoodRequest], batch_tokens: int, what: str = "scoring"
) -> list[Loglikelihood]:
    """The scores of passages in order, on every rank, with progress."""
    from megatron_ext.inference.score import score

    found: dict[int, Loglikelihood] = {}
    with Progress(what, len(passages)) as shown:
        for number, result in score(model, passages, batch_tokens):
            found[number] = result
            shown.advance()
    return [found[i] for i in range(len(passages))]
