"""How probable given texts are: the log-probability of each token after those before it, without keeping logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from megatron.core import parallel_state as mpu
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.inference.interrupt import Interrupted, exchange
from megatron_ext.inference.loglikelihood import Loglikelihood, LoglikelihoodRequest
from megatron_ext.inference.sharded import ShardedModel
from megatron_ext.lm_head.hidden_states import head, hidden_states
from megatron_ext.lm_head.log_probabilities import log_probabilities
from megatron_ext.lm_head.vocab_parallel import VocabParallel
from megatron_ext.platform.context_parallel import zigzag_split


def score(
    model: ShardedModel, passages: Sequence[LoglikelihoodRequest], batch_tokens: int = 8192
) -> Iterator[tuple[int, Loglikelihood]]:
    """Score texts; every rank gives the same texts and gets every score, in batches as they are done.

    Args:
        model: The model.
        passages: The texts; the longest are scored first.
        batch_tokens: Tokens that go through at once on each data-parallel rank; a longer text goes alone.

    Yields:
        The number of a text, and its score.

    Raises:
        ConfigError: A text has nothing to score, or an unknown token.
        Interrupted: A rank was asked to stop, and there is more to score.
    """
    _check(model, passages)
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    order = sorted(range(len(passages)), key=lambda i: (-len(passages[i].tokens), i))
    while order:
        length = _padded(len(passages[order[0]].tokens) - 1, model)
        rows = max(1, min(batch_tokens // length, -(-len(order) // size)))
        most = rows * size * (1 if model.stages == 1 else 4 * model.stages)
        wave, order = order[:most], order[most:]
        # All ranks have as many batches, of one shape: those that share experts work through the layers together.
        count = -(-len(wave) // (rows * size))
        if len(model.chunks) > 1:
            count = -(-count // model.stages) * model.stages
        own = wave[rank::size]
        batches = [_batch(passages, own[i * rows : (i + 1) * rows], rows, length) for i in range(count)]
        with torch.no_grad():
            done = model.run(
                batches, (rows, length),
                lambda chunk, batch: hidden_states(chunk, batch.tokens, batch.positions, None),
                partial(_scores, model.vocab_size),
            )  # fmt: skip
        parts, asked = exchange(done if model.is_output_rank else [])
        for part in parts:
            for scores in part:
                yield from scores.items()
        if asked and order:
            raise Interrupted(asked)


def _padded(length: int, model: ShardedModel) -> int:
    """A length that all ranks that share a sequence can share."""
    sequence_parallel = model.chunks[0].config.sequence_parallel
    multiple = mpu.get_tensor_model_parallel_world_size() if sequence_parallel else 1
    if (context_parallel := mpu.get_context_parallel_world_size()) > 1:
        multiple *= 2 * context_parallel
    return -(-length // multiple) * multiple


@dataclass(frozen=True)
class _Batch:
    """A micro-batch: what each token is followed by, and where that is scored. Rows that only fill it have no owner."""

    owners: list[int]
    tokens: Int[Tensor, "b s"]
    positions: Int[Tensor, "b s"]
    labels: Int[Tensor, "b whole"]
    wanted: Bool[Tensor, "b whole"]


def _batch(passages: Sequence[LoglikelihoodRequest], owners: list[int], rows: int, length: int) -> _Batch:
    tokens = torch.zeros(rows, length + 1, dtype=torch.int64)
    wanted = torch.zeros(rows, length, dtype=torch.bool)
    for row, owner in enumerate(owners):
        passage = passages[owner]
        tokens[row, : len(passage.tokens)] = torch.as_tensor(passage.tokens)
        wanted[row, passage.first - 1 : len(passage.tokens) - 1] = True
    device = torch.cuda.current_device()
    tokens, wanted = tokens.to(device), wanted.to(device)
    rank, ranks = mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()
    here = zigzag_split(torch.arange(length, device=device), rank, ranks)
    return _Batch(owners, tokens[:, here], here.expand(rows, -1), tokens[:, 1:], wanted)


def _scores(
    vocab_size: int, chunk: HybridModel, batch: _Batch, hidden: Float[Tensor, "s b h"]
) -> dict[int, Loglikelihood]:
    """From the last stage's states to the scores of a micro-batch."""
    groups: Any = chunk.pg_collection
    model = head(chunk, hidden)
    states, weight = model.hidden, model.weight
    here = batch.positions[0]
    wanted = batch.wanted[:, here]
    vocabulary = VocabParallel(weight.shape[0], vocab_size, groups.tp)
    scored = log_probabilities(
        model._replace(hidden=states.transpose(0, 1)[wanted]), batch.labels[:, here][wanted], vocabulary
    )
    whole = scored.new_zeros(2, *batch.labels.shape)
    whole[:, :, here] = whole[:, :, here].masked_scatter(wanted, scored)
    if groups.cp.size() > 1:
        dist.all_reduce(whole, group=groups.cp)
    whole = whole.cpu()
    found = {}
    for row, owner in enumerate(batch.owners):
        log_probability, greedy = whole[:, row, batch.wanted[row].cpu()]
        found[owner] = Loglikelihood(log_probability.clone(), greedy > 0)
    return found


def _check(model: ShardedModel, passages: Sequence[LoglikelihoodRequest]) -> None:
    for number, passage in enumerate(passages):
        if not 1 <= passage.first < len(passage.tokens):
            raise ConfigError(
                f"text {number} has nothing to score", got=f"{len(passage.tokens)} tokens from {passage.first} on",
                legal="at least one token of context, and one to score",
            )  # fmt: skip
        if not 0 <= min(passage.tokens) <= max(passage.tokens) < model.vocab_size:
            raise ConfigError(
                f"text {number} has a token that the model does not know", got=max(passage.tokens),
                legal=f"0 to {model.vocab_size - 1}: the tokenizer is not this model's",
            )  # fmt: skip
