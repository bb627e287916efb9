"""Generation: prompts are continued token by token, with caches for attention and a constant state for Mamba-2.

A batch shares one position, because Megatron's static caches have one. So prompts of about the same length go together:
what the shortest has goes through at once, and then, token by token, the longer prompts give their own tokens where
the shorter ones already get new ones. Nothing is padded, so no model needs a mask.
"""

import warnings
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from megatron.core import parallel_state as mpu
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.inference.cached import CachedModel
from megatron_ext.inference.interrupt import Interrupted, exchange
from megatron_ext.inference.request import Request, plan
from megatron_ext.inference.sampling import Sampling, choose
from megatron_ext.inference.sharded import ShardedModel

GREEDY = Sampling()


def generate(
    model: ShardedModel, requests: Sequence[Request], sampling: Sampling = GREEDY, batch_size: int = 8
) -> Iterator[tuple[int, list[int]]]:
    """Continue prompts; every rank gives the same requests and gets every continuation, in batches as they are done.

    Args:
        model: The model.
        requests: What to continue.
        sampling: How tokens are chosen.
        batch_size: Sequences that are continued at once, on each data-parallel rank.

    Yields:
        The number of a request, and its new tokens.

    Raises:
        ConfigError: A prompt is empty or holds an unknown token, or the layout has context parallelism.
        Interrupted: A rank was asked to stop, and there is more to continue.
    """
    _check(model, requests)
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    is_output_rank = model.is_output_rank
    if mpu.get_expert_model_parallel_world_size() > 1:
        # Ranks that share experts go through the layers together, token by token: they all work on the same.
        is_output_rank, rank, size = is_output_rank and rank == 0, 0, 1
    batches = plan(requests, batch_size)
    for first in range(0, len(batches), size):
        wave = batches[first : first + size]
        done = _continue(model, requests, wave[rank], sampling) if rank < len(wave) else {}
        parts, asked = exchange(done if is_output_rank else {})
        for part in parts:
            yield from part.items()
        if asked and first + size < len(batches):
            raise Interrupted(asked)


def _check(model: ShardedModel, requests: Sequence[Request]) -> None:
    if mpu.get_context_parallel_world_size() > 1:
        raise ConfigError(
            "generation has no context parallelism", got=f"size {mpu.get_context_parallel_world_size()}",
            legal="tensor, pipeline and data parallelism",
        )  # fmt: skip
    for number, request in enumerate(requests):
        if not request.prompt:
            raise ConfigError("an empty prompt", got=f"request {number}", legal="at least one token")
        if not 0 <= min(request.prompt) <= max(request.prompt) < model.architecture.padded_vocab_size:
            raise ConfigError(
                "a prompt with a token that the model does not know", got=f"request {number}: {max(request.prompt)}",
                legal=f"0 to {model.architecture.padded_vocab_size - 1}",
            )  # fmt: skip


@torch.no_grad()
def _continue(
    model: ShardedModel, requests: Sequence[Request], chosen: list[int], sampling: Sampling
) -> dict[int, list[int]]:
    """Continue one batch to its end, cut into as many micro-batches as there are pipeline stages."""
    device = torch.cuda.current_device()
    pieces = min(model.stages, len(chosen)) if len(model.chunks) == 1 else model.stages
    rows = -(-len(chosen) // pieces)
    # Rows that fill the last micro-batch repeat a request; nobody asks for what comes of them.
    owners = [requests[i] for i in chosen] + [requests[chosen[-1]]] * (pieces * rows - len(chosen))
    shortest = min(len(owner.prompt) for owner in owners)
    end = max(len(owner.prompt) + owner.max_new_tokens for owner in owners)
    tokens = torch.zeros(len(owners), end, dtype=torch.int64)
    for row, owner in enumerate(owners):
        tokens[row, : len(owner.prompt)] = torch.tensor(owner.prompt)
    tokens = tokens.to(device)
    draws = _draws(owners, chosen, sampling, end).to(device) if sampling.temperature else None
    cached = CachedModel(model, rows, end, pieces)
    new: list[list[int]] = [[] for _ in owners]
    ended = [owner.ended([]) for owner in owners]
    position, start = shortest, 0
    with model.no_sequence_parallel(), InferenceMode.active(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        while position < end and not all(ended):
            logits = cached.next_logits(tokens, start, position)
            added = torch.zeros(len(owners), dtype=torch.int64, device=device)
            if logits is not None:
                added = choose(logits, sampling, None if draws is None else draws[:, position])
            added = model.from_last_stage(added).cpu()
            for row, owner in enumerate(owners):
                if position >= len(owner.prompt) and not ended[row]:
                    new[row].append(int(added[row]))
                    ended[row] = owner.ended(new[row])
                elif position < len(owner.prompt):
                    added[row] = owner.prompt[position]
            tokens[:, position] = added.to(device)
            start, position = position, position + 1
    return {i: new[row] for row, i in enumerate(chosen)}


def _draws(owners: list[Request], chosen: list[int], sampling: Sampling, end: int) -> Float[Tensor, "n s"]:
    """For each sequence and position a number to draw with; the first new token of a request has its first."""
    draws = torch.zeros(len(owners), end, dtype=torch.float64)
    for row, (owner, number) in enumerate(zip(owners, chosen, strict=False)):
        first = len(owner.prompt)
        draws[row, first : first + owner.max_new_tokens] = sampling.draws(number, owner.max_new_tokens)
    return draws
