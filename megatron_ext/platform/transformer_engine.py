"""Plain torch modules under the names that Megatron-Core takes from Transformer Engine (where it is not installed).

Megatron's stock hybrid spec is written in these names, and `HybridStack` hard-codes one of them. With torch modules
behind them the stock spec builds unchanged, with the same parameter names, so that a checkpoint written without
Transformer Engine loads with it, and back. They run on any device.

Shapes: s sequence (local to the rank under sequence or context parallelism), b batch, h hidden, n heads, d channels.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right

from megatron_ext.platform import transformer_layers
from megatron_ext.platform.attention_cache import current_slot
from megatron_ext.platform.context_parallel import zigzag_join
from megatron_ext.platform.grouped_linear import TorchColumnParallelGroupedLinear, TorchRowParallelGroupedLinear
from megatron_ext.platform.linear import linear
from megatron_ext.platform.replacements import replace

REASON = "plain torch under Transformer Engine's name (TE absent)"

UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    """RMSNorm, or LayerNorm if there is a bias, of x (..., h); `zero_centered` weights store gamma - 1."""
    gamma = weight.to(x.dtype) + 1 if zero_centered else weight.to(x.dtype)
    if bias is None:
        return transformer_layers.rms_norm(x, gamma, eps)
    return F.layer_norm(x, gamma.shape, gamma, bias.to(x.dtype), eps)


def _norm_parameters(config: Any, size: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter | None]:
    """Weight (and bias for LayerNorm) of a norm over `size` channels, marked for sequence-parallel gradient sums."""
    make = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
    device = torch.cuda.current_device()
    weight = torch.nn.Parameter(make(size, dtype=config.params_dtype, device=device))
    bias = None
    if config.normalization == "LayerNorm":
        bias = torch.nn.Parameter(torch.zeros(size, dtype=config.params_dtype, device=device))
    for parameter in (weight, bias):
        if parameter is not None:
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight, bias


class TorchNorm(torch.nn.Module):
    """RMSNorm or LayerNorm, as `config.normalization` says."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.bias: torch.nn.Parameter | None
        self.weight, bias = _norm_parameters(config, hidden_size)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, self.bias, self.eps, self.zero_centered)


def kernels(q: Tensor) -> AbstractContextManager[Any]:
    """What may run attention: while tokens are generated not cuDNN, which plans anew for every length of the keys.

    Torch prefers it on a Hopper GPU, and a plan takes tens of milliseconds. In training lengths stay as they are.
    """
    from megatron.core.inference.utils import InferenceMode

    return sdpa_kernel(UNPLANNED) if q.device.type == "cuda" and InferenceMode.is_active() else nullcontext()


def shares_keys(q: Tensor) -> bool:
    """Whether a kernel without the square of scores takes fewer heads of keys than of queries in this type here.

    In 32 bits the one that runs on a GPU (memory-efficient) does not, and torch would fall back to the plain formula.
    """
    return q.device.type != "cuda" or q.dtype in (torch.bfloat16, torch.float16)


def groups_as_sequences(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b, n, s, d) and (b, groups, t, d) as (b groups, n / groups, s, d) and (b groups, n / groups, t, d).

    Each group of heads with its keys becomes a sequence of its own; keys and values are repeated without a copy.
    """
    share = q.shape[1] // k.shape[1]
    k, v = (t.flatten(0, 1)[:, None].expand(-1, share, -1, -1) for t in (k, v))
    return q.unflatten(1, (-1, share)).flatten(0, 1), k, v


class TorchDotProductAttention(torch.nn.Module):
    """Causal (or explicitly masked) scaled-dot-product attention, (s, b, n, d) in, (s, b, n * d) out.

    Of a configuration with `window_size` (w - 1, 0) a query sees the w last keys, with its own; with a field
    `attention_softcap` c its logits are c tanh(x / c).

    Under context parallelism the keys and values are gathered over the group: rank r of C holds the r-th and the
    (2C-1-r)-th of 2C equal pieces of the sequence, so that the causal work is balanced.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        from megatron.core import parallel_state

        self.config, self.attn_mask_type, self.softmax_scale = config, attn_mask_type, softmax_scale
        # Queries see so many keys, with their own; all before them if it is 0.
        window = getattr(config, "window_size", None)
        self.window = 0 if window is None else window[0] + 1
        self.softcap: float | None = getattr(config, "attention_softcap", None)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.num_attention_heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.cp_group = None
        if config.context_parallel_size > 1:
            self.cp_group = pg_collection.cp if pg_collection else parallel_state.get_context_parallel_group()

    @property
    def is_plain(self) -> bool:
        """Whether a query sees all keys before it, and logits are not bounded."""
        return not self.window and self.softcap is None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        if packed_seq_params is not None or attention_bias is not None:
            raise NotImplementedError("packed sequences and attention bias need Transformer Engine's attention")
        if (slot := current_slot()) is not None:
            return slot.attend(query[0], key, value, slot.position, self.softmax_scale).flatten(1)[None]
        kind = (attn_mask_type or self.attn_mask_type).name
        if self.cp_group is None:
            mask = ~attention_mask if kind in ("padding", "arbitrary") and attention_mask is not None else None
            out = self._attend(query, key, value, mask, "causal" in kind)
        else:
            key, value = self._gather(key), self._gather(value)
            size, rank = self.cp_group.size(), self.cp_group.rank()  # type: ignore[union-attr]
            half = query.shape[0] // 2
            # Each half sees what lies before its end: the other keys are not even read.
            ends = (half * (rank + 1), half * (2 * size - rank))
            parts = zip(query.split(half), ends, strict=True)
            out = torch.cat([self._attend(part, key[:end], value[:end], None, True) for part, end in parts])
        return out.flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Attention of (s, b, n, d) to (t, b, groups, d); causal, the queries are the last s of the t positions."""
        if self.window and len(key) >= len(query) + self.window:  # the first keys are seen by none
            first = len(key) - len(query) - self.window + 1
            key, value = key[first:], value[first:]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if causal and self.window and q.shape[2] > 1 and k.shape[2] > self.window:
            place = torch.arange(k.shape[2], device=q.device)
            behind = place[-q.shape[2] :, None] - place
            mask, causal = (behind >= 0) & (behind < self.window), False
        elif causal:
            last = q.shape[2] == 1  # it sees everything
            mask = None if last or q.shape[2] == k.shape[2] else causal_lower_right(q.shape[2], k.shape[2])
            causal = not last and mask is None
        whole = q.shape[:3]
        if self.softcap is not None:
            return self._bounded(q, k, v, mask, causal).reshape(*whole, -1).permute(2, 0, 1, 3)
        if q.shape[2] == 1 and mask is None:
            # The heads of a group ask the same keys. As queries of one head they read them once.
            q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        if q.shape[1] != k.shape[1] and not shares_keys(q) and (mask is None or isinstance(mask, CausalBias)):
            q, k, v = groups_as_sequences(q, k, v)
        dropout = self.dropout if self.training else 0.0
        with kernels(q):
            if causal and not dropout:
                out = transformer_layers.causal_attention(q, k, v, self.softmax_scale)
            else:
                out = F.scaled_dot_product_attention(
                    q, k, v, mask, dropout, causal, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
                )
        return out.reshape(*whole, -1).permute(2, 0, 1, 3)

    def _bounded(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool) -> Tensor:
        """Attention whose logits are bounded, in plain formulas; (b, n, s, d) queries, (b, groups, t, d) keys."""
        assert self.softcap is not None
        share = q.shape[1] // k.shape[1]
        scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        logits = q.unflatten(1, (-1, share)).flatten(2, 3) @ k.mT * scale
        logits = (self.softcap * (logits / self.softcap).tanh()).unflatten(2, (share, -1))
        if causal or isinstance(mask, CausalBias):
            sizes = logits.shape[-2:]
            mask = torch.ones(sizes, dtype=torch.bool, device=q.device).tril(sizes[1] - sizes[0])
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        weights = logits.softmax(-1, dtype=torch.float32).to(v.dtype)
        weights = F.dropout(weights, self.dropout, self.training)
        return (weights.flatten(2, 3) @ v).unflatten(2, (share, -1)).flatten(1, 2)

    def _gather(self, x: Tensor) -> Tensor:
        """The whole sequence, in order, from the two pieces of each rank."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        parts = gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)
        return zigzag_join(parts, self.cp_group.size())  # type: ignore[union-attr]


def _linear_classes() -> dict[str, type]:
    """Megatron's own parallel linears with the few attributes that callers expect of Transformer Engine's."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    class FastOnCpu:
        """The product itself by the library that is fast on this processor, where it is nothing but a product."""

        def _forward_impl(self, input: Tensor, weight: Tensor, *, bias: Tensor | None, **how: Any) -> Tensor:
            more = ("gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel")
            apart = any(how[name] for name in more) or how["gtp_remat_size"] > 1
            if input.device.type != "cpu" or apart or how["grad_output_buffer"] is not None:
                return super()._forward_impl(input=input, weight=weight, bias=bias, **how)  # type: ignore[misc]
            return linear(input, weight, bias)

    class TorchColumnParallelLinear(FastOnCpu, ColumnParallelLinear):
        te_return_bias = True
        return_layernorm_output = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            weight: Any = self.weight
            self.out_features, self.in_features = weight.shape

    class TorchRowParallelLinear(FastOnCpu, RowParallelLinear):
        te_return_bias = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            weight: Any = self.weight
            self.out_features, self.in_features = weight.shape

    class TorchLayerNormColumnParallelLinear(TorchColumnParallelLinear):
        """The pre-norm and the linear in one module: `layer_norm_weight`, `weight`."""

        def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.eps, self.zero_centered = config.layernorm_epsilon, config.layernorm_zero_centered_gamma
            self.layer_norm_bias: torch.nn.Parameter | None
            self.layer_norm_weight, bias = _norm_parameters(config, input_size)
            self.register_parameter("layer_norm_bias", bias)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            normed = normalize(x, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered)
            out, bias = super().forward(normed, *args, **kwargs)
            return (out, bias, normed) if self.return_layernorm_output else (out, bias)

    return {
        "TEColumnParallelLinear": TorchColumnParallelLinear,
        "TERowParallelLinear": TorchRowParallelLinear,
        "TELayerNormColumnParallelLinear": TorchLayerNormColumnParallelLinear,
    }


def install() -> None:
    """Put the torch modules under Transformer Engine's names; before any Megatron module spec is imported.

    Raises:
        RuntimeError: A module that reads these names was imported before.
    """
    import sys

    import megatron.core.extensions.transformer_engine as extension

    if extension.HAVE_TE:
        return
    readers = [f"megatron.core.models.{name}" for name in ("hybrid.hybrid_block", "hybrid.hybrid_layer_specs")]
    late = [name for name in readers if name in sys.modules]
    if late:
        raise RuntimeError(f"prepare the platform before importing {', '.join(late)}")
    names = {
        "TENorm": TorchNorm, "TEDotProductAttention": TorchDotProductAttention, **_linear_classes(),
        "TEColumnParallelGroupedLinear": TorchColumnParallelGroupedLinear,
        "TERowParallelGroupedLinear": TorchRowParallelGroupedLinear,
        "TELinear": None,  # imported by the stock spec for layer types that need the real thing, never built
    }  # fmt: skip
    for name, value in names.items():
        replace(extension, name, value, REASON)

    import megatron.core.extensions.transformer_engine_spec_provider as provider
    import megatron.core.models.gpt.gpt_layer_specs as gpt_specs
    import megatron.core.transformer.transformer_block as transformer_block
    import megatron.core.utils as core_utils
    from packaging.version import Version

    # The specs compare versions; 1.9 is the oldest that has every name above, and its norms for query and key.
    replace(core_utils, "_te_version", Version("1.9.0"), REASON)
    replace(gpt_specs, "TESpecProvider", provider.TESpecProvider, REASON)
    replace(gpt_specs, "TENorm", TorchNorm, REASON)
    replace(transformer_block, "LayerNormImpl", TorchNorm, REASON)
    replace(gpt_specs, "HAVE_TE", True, REASON)
