"""Parameters that are alike on all ranks, a file of each with the state of its AdamW: the same on every layout."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ext.checkpoint.atomic import atomic_write
from megatron_ext.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def write_parameter(path: Path, weight: torch.nn.Parameter, state: dict[str, Tensor]) -> None:
    """Write a parameter and its optimizer's state (`torch.optim.AdamW.state`)."""
    tensors = {"weight": weight.detach(), "step": state["step"], **{name: state[name] for name in MOMENTS}}
    with atomic_write(path) as temporary:
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, temporary)


def read_parameter(path: Path, weight: torch.nn.Parameter) -> dict[str, Tensor]:
    """Read a parameter that was written so into `weight`; its optimizer's state.

    Raises:
        CheckpointError: The file has a parameter of another shape.
        FileNotFoundError: There is none.
    """
    tensors = load_file(path)
    if (found := tensors["weight"].shape) != weight.shape:
        got = f"{path}: {list(found)}"
        raise CheckpointError("a saved parameter has another shape", got=got, legal=list(weight.shape))
    weight.data.copy_(tensors["weight"])
    return {"step": tensors["step"], **{name: tensors[name].to(weight.device) for name in MOMENTS}}
