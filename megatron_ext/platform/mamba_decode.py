"""One more token in `MambaMixer`, for a batch: Megatron-Core 0.19.2 can only do it for a single sequence.

Its decode step takes (b, 1, d) and is handed (1, b, d) by the static batches, as if the sequences were tokens of one
(its dynamic batches are transposed first); and its torch path, for want of Triton, adds a dimension to what it then
gates. Shapes: b batch, d channels, h heads, p channels of a head, g groups, n state.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from megatron_ext.platform.replacements import replace


class DecodeKernels(Protocol):
    """The two updates, with mamba_ssm's and causal_conv1d's signatures."""

    causal_conv1d_update: Callable[..., Tensor]
    selective_state_update: Callable[..., Tensor]


def install(kernels: DecodeKernels | None) -> None:
    """Mend the decode step; with `kernels` instead of Megatron's own Triton ones, where those cannot run."""
    import megatron.core.ssm.mamba_mixer as module

    mixer: Any = module.MambaMixer
    batched = mixer._decode

    def decode(
        self: Any, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor, batch_indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if batch_indices is not None:
            return batched(self, hidden_states, conv_state, ssm_state, batch_indices)
        assert hidden_states.shape[0] == 1
        projected, _ = self.in_proj(hidden_states)
        if kernels is None:
            y = self._ssm_decode(projected.transpose(0, 1), conv_state=conv_state, ssm_state=ssm_state)
            return self.out_proj(y.transpose(0, 1).contiguous())
        return self.out_proj(_step(self, kernels, projected[0], conv_state, ssm_state)[None])

    replace(mixer, "_decode", decode, "decoding a static batch of more than one sequence (everywhere)")


def _step(mixer: Any, kernels: DecodeKernels, projected: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
    """From the input projection (b, ...) to what the output projection takes, (b, h p); both states in place."""
    heads, p, groups, n = mixer.nheads_local_tp, mixer.headdim, mixer.ngroups_local_tp, mixer.d_state
    z, convolved, dt = projected.split([heads * p, heads * p + 2 * groups * n, heads], dim=-1)
    weight, bias = mixer.conv1d_weight.squeeze(1), mixer.conv1d_bias
    x, B, C = kernels.causal_conv1d_update(convolved, conv_state, weight, bias, mixer.activation).split(
        [heads * p, groups * n, groups * n], dim=-1
    )
    each = (heads, p)
    D = mixer.D.view(heads, p) if mixer.D_has_hdim else mixer.D[:, None].expand(each)
    y = kernels.selective_state_update(
        ssm_state, x.unflatten(-1, each), dt[..., None].expand(-1, *each),
        -mixer.A_log.float().exp()[:, None, None].expand(*each, n), B.unflatten(-1, (groups, n)),
        C.unflatten(-1, (groups, n)), D, z=None if mixer.rmsnorm else z.unflatten(-1, each),
        dt_bias=mixer.dt_bias[:, None].expand(each), dt_softplus=True,
    ).flatten(1)  # fmt: skip
    return mixer.norm(y, z) if mixer.rmsnorm else y
