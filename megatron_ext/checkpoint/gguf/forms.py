"""Tensors that GGUF has in another form than Hugging Face: in another order, shifted, of another shape or name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.models.architecture import Architecture

ALWAYS_FP32 = ("ssm_a", "ssm_d", "ssm_conv1d.weight", "ssm_norm.weight")
"""Ends of GGUF's names of tensors that are no vectors and are in fp32 in any file, as vectors are."""


@dataclass(frozen=True)
class Form:
    """How tensors of some names are stored. Both functions also take tensors without values (`meta`).

    Attributes:
        endings: Ends of their names, in Hugging Face's words.
        to_gguf: From Hugging Face's form.
        from_gguf: Back.
        renamed: What the `gguf` package calls them, where it does not know Hugging Face's name.
        exact: Whether they stay in fp32, whatever the type of the matrices.
    """

    endings: tuple[str, ...]
    to_gguf: Callable[[Architecture, Tensor], Tensor]
    from_gguf: Callable[[Architecture, Tensor], Tensor]
    renamed: str | None = None
    exact: bool = False


def _interleave(arch: Architecture, weight: Tensor) -> Tensor:
    """Rows of query or key: the two halves of a head's channels become pairs side by side."""
    halves = weight.unflatten(0, (-1, 2, arch.kv_channels // 2))
    return halves.transpose(1, 2).reshape(weight.shape)


def _separate(arch: Architecture, weight: Tensor) -> Tensor:
    """The inverse of `_interleave`."""
    pairs = weight.unflatten(0, (-1, arch.kv_channels // 2, 2))
    return pairs.transpose(1, 2).reshape(weight.shape)


ROTATED_PAIRS = Form(
    tuple(f"self_attn.{name}_proj.{kind}" for name in "qk" for kind in ("weight", "bias")), _interleave, _separate
)
"""llama.cpp rotates pairs of channels side by side where its architecture says so, transformers the two halves."""

SHIFTED_NORMS = Form(("norm.weight",), lambda arch, weight: weight.float() + 1, lambda arch, weight: weight - 1)
"""Norms whose weights are stored minus one."""

MAMBA2 = (
    Form(("mixer.A_log",), lambda arch, weight: -torch.exp(weight.float())[:, None],
         lambda arch, weight: torch.log(-weight.flatten()), exact=True),
    Form(("mixer.D",), lambda arch, weight: weight[:, None], lambda arch, weight: weight.flatten(), exact=True),
    Form(("mixer.conv1d.weight",), lambda arch, weight: weight.squeeze(1), lambda arch, weight: weight.unsqueeze(1)),
    Form(("mixer.norm.weight",), lambda arch, weight: weight.view(arch.mamba_num_groups, -1),
         lambda arch, weight: weight.flatten()),
    Form(("mixer.dt_bias",), lambda arch, weight: weight, lambda arch, weight: weight, renamed="mixer.dt_proj.bias",
         exact=True),
)  # fmt: skip
"""Of a Mamba-2 layer."""
