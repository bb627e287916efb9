"""Weights in the layout of the published checkpoints, to ours and back.

Names differ, decay rates are flat, and some things lie in another order: the two branches of a mixer in pairs
(`in_proj`, the convolutions, `out_proj`), heads one after the other (`qkv`). And the published code adds the bias of
step sizes twice, once in `dt_proj` and once in the scan: ours is twice theirs, so that the function is the same.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import CheckpointError
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.network import Network

_RENAMED = (
    (r"patch_embed\.conv_down\.", "stem."),
    (r"levels\.(\d)\.downsample\.reduction\.0\.", r"downsamples.\1."),
    (r"levels\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"\.mlp\.fc", ".fc"),
    (r"\.gamma_", ".gamma"),
)


def from_published(state: Mapping[str, Tensor], model: MambaVision) -> dict[str, Tensor]:
    """Ours, of a published state dict, with or without what a trainer has wrapped it in.

    Raises:
        CheckpointError: A tensor is missing, of another shape, or not known.
    """
    state = _unwrapped(state)
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(".conv1d_z.weight"):
            continue  # with conv1d_x
        if name.endswith(".conv1d_x.weight"):
            second = state.get(name.replace("conv1d_x", "conv1d_z"))
            if second is None or second.shape != value.shape:
                raise CheckpointError("a mixer's second convolution", got=name, legal="one as large as the first")
            name, value = name.replace("conv1d_x.weight", "conv_weight"), torch.cat([value, second])
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        value = value.flatten() if name.endswith(".A_log") else value
        with suppress(RuntimeError):  # of another size, which is told below
            value = _reordered(name, value, model, _to_pairs, _to_heads, 2.0)
        found[name] = value
    check_shapes({name: value.shape for name, value in found.items()}, model)
    return found


def check_shapes(found: Mapping[str, Sequence[int]], model: MambaVision) -> None:
    """Find what tensors of these names and shapes lack of a network, or have beside it.

    Raises:
        CheckpointError: Says what.
    """
    with torch.device("meta"):
        expected = {name: value.shape for name, value in Network(model).state_dict().items()}
    wrong = {name for name in found.keys() & expected.keys() if tuple(found[name]) != tuple(expected[name])}
    for what, names in (
        ("the checkpoint lacks tensors of this network", expected.keys() - found.keys()),
        ("the checkpoint has tensors that this network does not have", found.keys() - expected.keys()),
        ("tensors of the checkpoint have other shapes than this network's", wrong),
    ):
        if names:
            few = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(what, got=few, legal="a checkpoint of the same variant, or its --preset")


def to_published(state: Mapping[str, Tensor], model: MambaVision) -> dict[str, Tensor]:
    """Of ours, a state dict as the published code has it."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        value = value.unflatten(0, (-1, model.state)) if name.endswith(".A_log") else value
        value = _reordered(name, value, model, _from_pairs, _from_heads, 0.5)
        name = name.replace("stem.", "patch_embed.conv_down.") if name.startswith("stem.") else name
        name = re.sub(r"^downsamples\.(\d)\.", r"levels.\1.downsample.reduction.0.", name)
        name = re.sub(r"^stages\.(\d)\.", r"levels.\1.", name)
        name = re.sub(r"\.(fc[12])\.", r".mlp.\1.", name)
        name = re.sub(r"\.gamma([12])$", r".gamma_\1", name)
        if name.endswith(".conv_weight"):
            for branch, part in zip("xz", value.chunk(2), strict=True):
                found[name.replace("conv_weight", f"conv1d_{branch}.weight")] = part
        else:
            found[name] = value
    return found


def load_published(path: Path, model: MambaVision) -> dict[str, Tensor]:
    """A published file's weights as ours; nothing in it is executed.

    Raises:
        CheckpointError: It cannot be read, or holds another network.
    """
    return from_published(read_published(path), model)


def read_published(path: Path) -> dict[str, Tensor]:
    """A published file's state dict as it is; nothing in it is executed.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return _unwrapped(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a damaged archive raises
        raise CheckpointError("no checkpoint that can be read", got=f"{path}: {error!r}") from error


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without what a trainer has wrapped it in."""
    for wrapped in ("state_dict", "model"):
        if wrapped in state and not isinstance(state[wrapped], Tensor):
            state = state[wrapped]
    return {name.removeprefix("module."): value for name, value in state.items()}


def _reordered(name, value, model, pairs, heads, steps: float) -> Tensor:  # type: ignore[no-untyped-def]
    if name.endswith((".in_proj.weight", ".conv_weight")):
        return pairs(value)
    if name.endswith(".out_proj.weight"):
        return pairs(value.mT).mT
    if name.endswith((".qkv.weight", ".qkv.bias")):
        return heads(value, model.head_dim)
    return value * steps if name.endswith(".dt_proj.bias") else value


def _to_pairs(t: Tensor) -> Tensor:
    return t.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def _from_pairs(t: Tensor) -> Tensor:
    return t.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


def _to_heads(t: Tensor, head_dim: int) -> Tensor:
    return t.unflatten(0, (3, -1, head_dim)).transpose(0, 1).flatten(0, 2)


def _from_heads(t: Tensor, head_dim: int) -> Tensor:
    return t.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)
