"""What a model costs: parameters on each rank; to serve it, bytes of weights, of caches, and those that a token moves.

Decoding is bound by memory traffic: each step reads the weights once for the whole batch, and for each sequence its
keys and values so far and its Mamba-2 states, which it also writes back. Of a mixture's experts a step reads those
that some sequence of the batch needs: the chosen ones for one sequence, all of them for a large batch.
"""

from dataclasses import dataclass

from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.axes import CONV_KERNEL
from megatron_ext.models.dimensions import Dimensions
from megatron_ext.models.pattern import ATTENTION, MAMBA, parse

BYTES = 2  # of a value in 16 bits: weights, keys and values, states


@dataclass(frozen=True)
class Workload:
    """How a model is served.

    Attributes:
        batch: Sequences at once.
        context: Tokens of each sequence that are cached.
    """

    batch: int = 1
    context: int = 8192


def kv_bytes_per_token(arch: Architecture) -> int:
    """Bytes that each cached token of a sequence adds: a key and a value per group and attention layer."""
    return BYTES * arch.pattern.count(ATTENTION) * 2 * arch.num_query_groups * arch.kv_channels


def kv_bytes(arch: Architecture, context: int) -> int:
    """Bytes of the keys and values of a sequence of `context` tokens: of a layer with a window no more than fill it."""
    windows = (arch.window(layer) for layer in arch.layers.indices(ATTENTION))
    tokens = sum(min(context, window or context) for window in windows)
    return BYTES * tokens * 2 * arch.num_query_groups * arch.kv_channels


def state_bytes_per_sequence(arch: Architecture) -> int:
    """Bytes of the Mamba-2 states of a sequence, whatever its length: the SSM state and the convolution's window."""
    total = 0
    for layer in arch.layers.indices(MAMBA):
        own = arch.at(layer)
        convolved = own.mamba_inner_size + 2 * own.mamba_num_groups * own.mamba_state_dim
        total += own.mamba_inner_size * own.mamba_state_dim + convolved * CONV_KERNEL
    return BYTES * total


def cache_bytes(arch: Architecture, workload: Workload) -> int:
    """Bytes of all caches."""
    return workload.batch * (kv_bytes(arch, workload.context) + state_bytes_per_sequence(arch))


def memory_bytes(arch: Architecture, workload: Workload) -> int:
    """Bytes of weights and caches; what activations need while decoding is not counted."""
    return BYTES * arch.num_parameters() + cache_bytes(arch, workload)


def read_experts(arch: Architecture, batch: int) -> float:
    """The share of the experts that a step of `batch` tokens reads, `1 - (1 - k/E)^batch` for k chosen of E.

    That is the mean if every token chooses evenly and for itself; k/E for one token.
    """
    return 1 - (1 - arch.moe_router_topk / arch.num_experts) ** batch if arch.num_experts else 0.0


def decode_bytes_per_token(arch: Architecture, workload: Workload) -> float:
    """Bytes moved for one generated token at the end of the context: a lower bound of its time, times bandwidth."""
    weights = arch.num_parameters() - (1 - read_experts(arch, workload.batch)) * arch.num_expert_parameters()
    if arch.untie_embeddings_and_output_weights:
        weights -= arch.padded_vocab_size * arch.hidden_size  # one row of the embedding is read, not the table
    states = 2 * state_bytes_per_sequence(arch)
    return BYTES * weights / workload.batch + kv_bytes(arch, workload.context) + states


def parameters_per_rank(
    arch: Dimensions, *, tp: int = 1, pp: int = 1, ep: int = 1, etp: int | None = None
) -> list[int]:
    """Parameters that one rank of each pipeline stage holds, stages in order.

    The pattern is split as `Pattern.split` does. Tied embeddings are held twice where the first and the last stage
    are different ranks, as Megatron does.
    """
    sizes = [0] * pp
    stage_of = [stage for stage, units in enumerate(parse(arch.pattern).split(pp).stages) for _ in units]
    for key in axes.keys(arch):
        layer, weight = axes.locate(arch, key)
        own = axes.size(arch, key, tp=tp, ep=ep, etp=etp)
        sizes[stage_of[layer] if layer is not None else 0 if key == axes.EMBEDDING else -1] += own
        if weight.name == axes.EMBEDDING and not arch.untie_embeddings_and_output_weights and pp > 1:
            sizes[-1] += own
    return sizes
