"""The norm after a Mamba-2 layer's scan in the same operation as the scan: Megatron-Core 0.19.2 calls it by itself.

`MambaMixer` has convolution, scan and gate done by one function and then reads what that wrote for the norm, whose
input is kept for the backward once more. The function can do the norm as well (`rmsnorm_weight`). Shapes: l sequence,
b batch, d channels.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from megatron_ext.platform.gathering import gathered
from megatron_ext.platform.replacements import replace

HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


class TrainingKernels(Protocol):
    """All between the two projections, with mamba_ssm's signature."""

    mamba_split_conv1d_scan_combined: Callable[..., Tensor]


def install(kernels: TrainingKernels) -> None:
    """Have the norm done by `kernels`, unless documents are packed, ranks share the sequence, or a hook is on the norm.

    One that runs before the norm does not count: `--overlap-param-gather` puts it there, to wait for the weight, in
    some steps and not in others, and a run that goes on would have other last bits than one without interruption.
    """
    import megatron.core.ssm.mamba_mixer as module

    mixer: Any = module.MambaMixer
    unfused = mixer._ssm_training

    def training(self: Any, zxBCdt: Tensor, packed_seq_params: Any = None) -> Tensor:
        apart = packed_seq_params is not None or self.cp.cp_size > 1 or not self.rmsnorm
        if apart or any(getattr(self.norm, hooks) for hooks in HOOKS):
            return unfused(self, zxBCdt, packed_seq_params)
        D = self.cp.get_D()
        y = kernels.mamba_split_conv1d_scan_combined(
            zxBCdt.transpose(0, 1),
            self.cp.get_conv1d_weight().squeeze(1),
            self.cp.get_conv1d_bias(),
            self.cp.get_dt_bias().float(),
            -self.cp.get_A_log().float().exp(),
            D.float().view(-1, self.headdim) if self.D_has_hdim else D,
            self.chunk_size,
            activation=self.activation,
            rmsnorm_weight=gathered(self.norm).weight,
            rmsnorm_eps=self.norm.eps,
            headdim=self.headdim,
            ngroups=self.cp.ngroups_local_tpcp,
            norm_before_gate=self.norm_before_gate,
        )
        return y.transpose(0, 1).contiguous()

    replace(
        mixer, "_ssm_training", training, "the norm of a Mamba-2 layer in one operation with its scan (our kernels)"
    )
