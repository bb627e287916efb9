"""Our operations behind the public signatures of mamba_ssm and causal_conv1d, which Megatron-Core's MambaMixer calls.

Signatures as in mamba_ssm 2.3 and causal_conv1d 1.6. What they can do and ours cannot raises a ConfigError. Two
arguments change the speed there and nothing here: `chunk_size` (a backend picks its own) and `state_dtype` (states are
float32 here, at least as exact as asked).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.ops.causal_conv1d import decode as conv_decode
from megatron_ext.ops.dispatch import backend
from megatron_ext.ops.mamba_mixer.projection import Projection
from megatron_ext.ops.ssd import decode as ssd_decode
from megatron_ext.ops.ssd.step_sizes import NO_LIMIT, step_sizes
from megatron_ext.platform.linear import linear


def causal_conv1d_fn(
    x: Float[Tensor, "b d l"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None = None,
    seq_idx: Int[Tensor, "b l"] | None = None,
    initial_states: Float[Tensor, "b d w-1"] | None = None,
    return_final_states: bool = False,
    final_states_out: Float[Tensor, "b d w-1"] | None = None,
    activation: str | None = None,
) -> Float[Tensor, "b d l"] | tuple[Float[Tensor, "b d l"], Float[Tensor, "b d w-1"]]:
    """`causal_conv1d.causal_conv1d_fn`: depthwise causal convolution, channels before tokens.

    Args:
        x: Inputs.
        weight: The taps; the last one meets the token itself.
        bias: Added before the activation.
        seq_idx: Document number of each token; taps do not reach into another document.
        initial_states: The w - 1 inputs before the first token (zero by default).
        return_final_states: Also return the last w - 1 inputs.
        final_states_out: Where to write them.
        activation: None, "silu" or "swish".

    Raises:
        ConfigError: Another activation, or initial states together with documents.
    """
    initial = None if initial_states is None else initial_states.mT
    ops = backend(x=x, taps=weight.shape[1])
    y, last = ops.causal_conv1d(x.mT, weight, bias, initial, seq_idx, activation)
    if not return_final_states:
        return y.mT
    final = last.mT
    return y.mT, (final if final_states_out is None else final_states_out.copy_(final))


def mamba_chunk_scan_combined(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    chunk_size: int,
    D: Float[Tensor, "h"] | Float[Tensor, "h p"] | None = None,
    z: Float[Tensor, "b l h p"] | None = None,
    dt_bias: Float[Tensor, "h"] | None = None,
    initial_states: Float[Tensor, "b h p n"] | None = None,
    seq_idx: Int[Tensor, "b l"] | None = None,
    cu_seqlens: Int[Tensor, "boundaries"] | None = None,
    dt_softplus: bool = False,
    dt_limit: Sequence[float] = NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Float[Tensor, "b l h p"] | tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """`mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined`: the scan, times silu(z) if there is a gate.

    Args:
        x: Inputs.
        dt: Step sizes, before bias and softplus.
        A: Decay rates, negative.
        B: Input projections, one per group of h / g heads.
        C: Output projections, one per group of heads.
        chunk_size: Without effect on the result.
        D: Skip weights, per head or per channel.
        z: The gate.
        dt_bias: Added to dt.
        initial_states: The state before the first token; it belongs to the first document of a row.
        seq_idx: Document number of each token; the state is forgotten where it changes.
        cu_seqlens: Where documents begin and the last one ends, in a single row; another way to say seq_idx.
        dt_softplus: Apply softplus to dt after the bias.
        dt_limit: dt is clamped to this range at last.
        return_final_states: Also return the state after the last token.
        return_varlen_states: Not supported.
        state_dtype: Without effect; states are float32.

    Raises:
        ConfigError: return_varlen_states is asked for, cu_seqlens comes with several rows or with seq_idx, or the heads
            do not divide into the groups.
    """
    if return_varlen_states:
        raise ConfigError("the state-space scan returns no states per document", got="return_varlen_states=True")
    if cu_seqlens is not None:
        if x.shape[0] != 1 or seq_idx is not None:
            raise ConfigError("cu_seqlens describes the documents of one row, and seq_idx the same", got=tuple(x.shape))
        seq_idx = torch.searchsorted(cu_seqlens[1:], torch.arange(x.shape[1], device=x.device), right=True)[None].int()
    steps = step_sizes(dt, dt_bias, dt_softplus, dt_limit)
    ops = backend(x=x, channels=x.shape[3], state=B.shape[3])
    y, state = ops.ssd(x, steps, A, B, C, D, initial_states, seq_idx)
    if z is not None:
        y = (y * F.silu(z.to(steps.dtype))).to(x.dtype)
    return (y, state) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Float[Tensor, "b l in_proj"],
    conv1d_weight: Float[Tensor, "d w"],
    conv1d_bias: Float[Tensor, "d"] | None,
    dt_bias: Float[Tensor, "h"],
    A: Float[Tensor, "h"],
    D: Float[Tensor, "h"] | Float[Tensor, "h p"],
    chunk_size: int,
    initial_states: Float[Tensor, "b h p n"] | None = None,
    seq_idx: Int[Tensor, "b l"] | None = None,
    dt_limit: Sequence[float] = NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Float[Tensor, "inner"] | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Float[Tensor, "out inner"] | None = None,
    outproj_bias: Float[Tensor, "out"] | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Float[Tensor, "b l out"] | tuple[Float[Tensor, "b l out"], Float[Tensor, "b h p n"]]:
    """`mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined`: all between the two projections, and more.

    Convolution, scan, then norm and gate if `rmsnorm_weight` is given, else the gate alone, then the output projection
    if its weight is given. inner = h p.

    Args:
        zxbcdt: The input projection: gate z, inputs x, B, C and dt side by side.
        conv1d_weight: Taps of the convolution over x, B and C.
        conv1d_bias: Its bias.
        dt_bias: Added to dt before softplus.
        A: Decay rates, negative.
        D: Skip weights, per head or per channel.
        chunk_size: Without effect on the result.
        initial_states: The state before the first token; it belongs to the first document of a row.
        seq_idx: Document number of each token; neither state nor taps cross into another document.
        dt_limit: dt is clamped to this range after softplus.
        return_final_states: Also return the state after the last token.
        activation: Of the convolution: None, "silu" or "swish".
        rmsnorm_weight: Of the gated norm, which runs over each group's channels.
        rmsnorm_eps: Of the gated norm.
        outproj_weight: Of the output projection.
        outproj_bias: Of the output projection.
        headdim: p; may be left out if D is given per channel.
        ngroups: g.
        norm_before_gate: norm(y) silu(z) if true, norm(y silu(z)) if false.
        state_dtype: Without effect; states are float32.

    Raises:
        ConfigError: Sizes do not fit together, or another activation.
    """
    heads = A.shape[0]
    p = D.shape[1] if D.dim() == 2 else headdim
    if p is None:
        raise ConfigError("the head dimension is unknown: D has one number per head", legal="pass headdim")
    inner, conv = heads * p, conv1d_weight.shape[0]
    if zxbcdt.shape[-1] != inner + conv + heads or (conv - inner) % (2 * ngroups):
        what = "the input projection does not split into z, x, B, C and dt"
        raise ConfigError(what, got=zxbcdt.shape[-1], legal=f"{inner} + {conv} + {heads}, {ngroups} groups")
    n = (conv - inner) // (2 * ngroups)
    ops = backend(x=zxbcdt, channels=p, state=n, taps=conv1d_weight.shape[1])
    projection, rest = Projection(heads, p, ngroups), (initial_states, seq_idx, dt_limit, activation)
    y, state = ops.conv_scan_norm(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, projection, *rest,
        rmsnorm_weight, rmsnorm_eps, norm_before_gate,
    )  # fmt: skip
    if outproj_weight is not None:
        y = linear(y.to(outproj_weight.dtype), outproj_weight, outproj_bias)
    return (y, state) if return_final_states else y


class RMSNorm(torch.nn.Module):
    """`mamba_ssm.ops.triton.layernorm_gated.RMSNorm`: norm(x) silu(z), or norm(x silu(z)).

    Args:
        hidden_size: Channels.
        eps: Added to the mean square.
        group_size: Channels that are normalised together; all of them by default.
        norm_before_gate: norm(x) silu(z) if true, norm(x silu(z)) if false.
        device: Of the weight.
        dtype: Of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        torch.nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*b d"], z: Float[Tensor, "*b d"] | None = None) -> Float[Tensor, "*b d"]:
        """The norm of x, gated by z if given."""
        return backend(x=x).gated_rms_norm(x, self.weight, z, self.eps, self.group_size, self.norm_before_gate)


def causal_conv1d_update(
    x: Float[Tensor, "b d"] | Float[Tensor, "b d l"],
    conv_state: Float[Tensor, "slots d w_state"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None = None,
    activation: str | None = None,
    cache_seqlens: Int[Tensor, "b"] | None = None,
    conv_state_indices: Int[Tensor, "b"] | None = None,
) -> Float[Tensor, "b d"] | Float[Tensor, "b d l"]:
    """`causal_conv1d.causal_conv1d_update`: the convolution of new tokens, in place on `conv_state`.

    Args:
        x: The new token, or tokens.
        conv_state: The last inputs, oldest first, at least w - 1 of them.
        weight: The taps; the last one meets the token itself.
        bias: Added before the activation.
        activation: None, "silu" or "swish".
        cache_seqlens: Not supported (a circular buffer).
        conv_state_indices: The slot of each row of x in `conv_state`.

    Raises:
        ConfigError: cache_seqlens is given, or another activation.
    """
    if cache_seqlens is not None:
        raise ConfigError("the convolution's state is no circular buffer", got="cache_seqlens", legal="None")
    if x.dim() == 3:
        steps = x.unbind(-1)
        rest = (conv_state, weight, bias, activation, None, conv_state_indices)
        return torch.stack([causal_conv1d_update(step, *rest) for step in steps], -1)
    conv_step = backend(x=x).conv_step if conv_state[0].is_contiguous() else conv_decode.conv_step
    return conv_step(x, conv_state, weight, bias, activation, conv_state_indices)


def selective_state_update(
    state: Float[Tensor, "slots h p n"],
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h p"],
    A: Float[Tensor, "h p n"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    D: Float[Tensor, "h p"] | None = None,
    z: Float[Tensor, "b h p"] | None = None,
    dt_bias: Float[Tensor, "h p"] | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Int[Tensor, "b"] | None = None,
) -> Float[Tensor, "b h p"]:
    """`mamba_ssm.ops.triton.selective_state_update.selective_state_update` for states with heads. In place on `state`.

    Args:
        state: The state before the token; afterwards the one after it.
        x: The token.
        dt: Step sizes, before bias and softplus.
        A: Decay rates, negative.
        B: Input projection, one per group of h / g heads.
        C: Output projection, one per group of heads.
        D: Skip weights.
        z: The gate.
        dt_bias: Added to dt.
        dt_softplus: Apply softplus to dt after the bias.
        state_batch_indices: The slot of each row of x in `state`.
    """
    ops = backend(x=x, channels=x.shape[2], state=B.shape[2])
    state_step = ops.state_step if state.is_contiguous() else ssd_decode.state_step
    return state_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
