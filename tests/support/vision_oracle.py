"""A small MambaVision network, and the published one's state dict and formulas, to compare with."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.checkpoint.blocks import TensorEntry
from megatron_ext.checkpoint.writer import writing
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.network import Network
from megatron_ext.vision.pruning.plan import ImagePlan

SMALL = MambaVision(
    pattern="C/C/MS/MS", dim=8, stem=6, head_dim=8, window=4, last_window=2, state=3, resolution=64, classes=5
)


def published_shapes(model: MambaVision) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published code's tensors, written down from its modules."""
    c, found = model.dim, {}

    def norm(name: str, size: int) -> None:
        found.update({f"{name}.{each}": (size,) for each in ("weight", "bias", "running_mean", "running_var")})
        found[f"{name}.num_batches_tracked"] = ()

    found["patch_embed.conv_down.0.weight"] = (model.stem, 3, 3, 3)
    norm("patch_embed.conv_down.1", model.stem)
    found["patch_embed.conv_down.3.weight"] = (c, model.stem, 3, 3)
    norm("patch_embed.conv_down.4", c)
    for level, stage in enumerate(model.stages):
        c = model.dim * 2**level
        for index, kind in enumerate(stage):
            at = f"levels.{level}.blocks.{index}"
            if kind == "C":
                for i in (1, 2):
                    found |= {f"{at}.conv{i}.weight": (c, c, 3, 3), f"{at}.conv{i}.bias": (c,)}
                    norm(f"{at}.norm{i}", c)
                continue
            found |= {f"{at}.{name}": (c,) for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")}
            found |= {f"{at}.mlp.fc1.weight": (4 * c, c), f"{at}.mlp.fc1.bias": (4 * c,)}
            found |= {f"{at}.mlp.fc2.weight": (c, 4 * c), f"{at}.mlp.fc2.bias": (c,)}
            if model.layer_scale is not None:
                found |= {f"{at}.gamma_1": (c,), f"{at}.gamma_2": (c,)}
            mixer, inner, rank = f"{at}.mixer", c // 2, math.ceil(c / 16)
            if kind == "S":
                found |= {f"{mixer}.qkv.weight": (3 * c, c), f"{mixer}.qkv.bias": (3 * c,)}
                found |= {f"{mixer}.proj.weight": (c, c), f"{mixer}.proj.bias": (c,)}
            else:
                found |= {f"{mixer}.in_proj.weight": (c, c), f"{mixer}.out_proj.weight": (c, c)}
                found |= {f"{mixer}.conv1d_{branch}.weight": (inner, 1, 3) for branch in "xz"}
                found |= {f"{mixer}.x_proj.weight": (rank + 2 * model.state, inner)}
                found |= {f"{mixer}.dt_proj.weight": (inner, rank), f"{mixer}.dt_proj.bias": (inner,)}
                found |= {f"{mixer}.A_log": (inner, model.state), f"{mixer}.D": (inner,)}
        if level < 3:
            found[f"levels.{level}.downsample.reduction.0.weight"] = (2 * c, c, 3, 3)
    norm("norm", c)
    return found | {"head.weight": (model.classes, c), "head.bias": (model.classes,)}


def write_checkpoint(path: Path, network: Network, averaged: bool = False) -> None:
    """A checkpoint of a network as Megatron saves it; with `averaged` an average of weights, which is twice them."""
    state = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    if averaged:
        floats = {name: value for name, value in network.state_dict().items() if value.is_floating_point()}
        state |= {"average." + name.replace(".", "/"): 2 * value for name, value in floats.items()}
        state["average.step"] = torch.tensor(3)
    entries = {name: TensorEntry(tuple(value.shape), value.dtype) for name, value in state.items()}
    schema = ImagePlan.keep_everything(network.model).schema(entries)
    with writing(path, network.model, schema=schema) as writer:
        for name, value in state.items():
            writer.write(name, value)


def random_network(model: MambaVision, seed: int = 0) -> Network:
    """One in evaluation mode whose norms have seen images, and whose weights and biases are large enough to matter."""
    torch.manual_seed(seed)
    network = Network(model).eval()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point() and not name.endswith("A_log"):
                value.add_(torch.randn_like(value) * 0.2)
    return network


def published_state(model: MambaVision, seed: int = 0) -> dict[str, Tensor]:
    """Random float64 tensors of those names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in published_shapes(model).items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
        if name.endswith("num_batches_tracked"):
            value = torch.tensor(3)
        found[name] = value.abs() + 0.5 if name.endswith("running_var") else value
    return found


def mixer(x: Tensor, weights: dict[str, Tensor], arm: str = "concatenated") -> Tensor:
    """The published mixer on tokens (b, l, c), one token and one tap after the other, with its bias added twice."""
    batch, length, _ = x.shape
    u, z = (x @ weights["in_proj.weight"].T).chunk(2, -1)

    def convolved(t: Tensor, taps: Tensor, shift: int) -> Tensor:
        padded = F.pad(t, (0, 0, 2, 2))
        return F.silu(sum(taps[:, 0, j] * padded[:, j + shift : j + shift + length] for j in range(3)))

    u = convolved(u, weights["conv1d_x.weight"], 0 if arm == "causal" else 1)
    z = convolved(z, weights["conv1d_z.weight"], 1) if arm in ("concatenated", "gated") else F.silu(z)
    rank, states = weights["dt_proj.weight"].shape[1], weights["A_log"].shape[1]
    raw, B, C = (u @ weights["x_proj.weight"].T).split([rank, states, states], -1)
    bias = weights["dt_proj.bias"]
    steps = F.softplus(raw @ weights["dt_proj.weight"].T + bias + bias)
    A, state = -weights["A_log"].exp(), u.new_zeros(batch, u.shape[-1], states)
    outputs = []
    for t in range(length):
        state = (steps[:, t, :, None] * A).exp() * state + (steps[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1) + weights["D"] * u[:, t])
    y = torch.stack(outputs, 1)
    return (torch.cat([y, z], -1) if arm == "concatenated" else y * z) @ weights["out_proj.weight"].T


def attention(x: Tensor, weights: dict[str, Tensor], head_dim: int) -> Tensor:
    """The published attention, head by head."""
    q, k, v = (x @ weights["qkv.weight"].T + weights["qkv.bias"]).chunk(3, -1)
    heads = [
        (a @ b.mT / head_dim**0.5).softmax(-1) @ c
        for a, b, c in zip(q.split(head_dim, -1), k.split(head_dim, -1), v.split(head_dim, -1), strict=True)
    ]
    return torch.cat(heads, -1) @ weights["proj.weight"].T + weights["proj.bias"]


def logits(images: Tensor, state: dict[str, Tensor], model: MambaVision) -> Tensor:
    """The published network in evaluation, window by window."""

    def norm(x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        mean, var, w, b = (state[f"{name}.{each}"] for each in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean[:, None, None]) / (var[:, None, None] + eps).sqrt() * w[:, None, None] + b[:, None, None]

    def layer_norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    x = F.conv2d(images, state["patch_embed.conv_down.0.weight"], None, 2, 1)
    x = F.conv2d(norm(x, "patch_embed.conv_down.1", 1e-4).relu(), state["patch_embed.conv_down.3.weight"], None, 2, 1)
    x = norm(x, "patch_embed.conv_down.4", 1e-4).relu()
    for level, stage in enumerate(model.stages):
        side, (height, width) = model.window_of(level), x.shape[2:]
        whole = F.pad(x, (0, -width % side, 0, -height % side)) if set(stage) & set("MS") else x
        for index, kind in enumerate(stage):
            at = f"levels.{level}.blocks.{index}"
            if kind == "C":
                hidden = F.conv2d(whole, state[f"{at}.conv1.weight"], state[f"{at}.conv1.bias"], 1, 1)
                hidden = F.gelu(norm(hidden, f"{at}.norm1"), approximate="tanh")
                hidden = F.conv2d(hidden, state[f"{at}.conv2.weight"], state[f"{at}.conv2.bias"], 1, 1)
                whole = whole + norm(hidden, f"{at}.norm2")
                continue
            rows = []
            for top in range(0, whole.shape[2], side):
                row = []
                for left in range(0, whole.shape[3], side):
                    window = whole[:, :, top : top + side, left : left + side]
                    t, own = window.flatten(2).mT, under(f"{at}.mixer.")
                    normed = layer_norm(t, f"{at}.norm1")
                    mixed = mixer(normed, own) if kind == "M" else attention(normed, own, model.head_dim)
                    t = t + state.get(f"{at}.gamma_1", 1) * mixed
                    hidden = (
                        layer_norm(t, f"{at}.norm2") @ state[f"{at}.mlp.fc1.weight"].T + state[f"{at}.mlp.fc1.bias"]
                    )
                    hidden = F.gelu(hidden) @ state[f"{at}.mlp.fc2.weight"].T + state[f"{at}.mlp.fc2.bias"]
                    t = t + state.get(f"{at}.gamma_2", 1) * hidden
                    row.append(t.mT.reshape(window.shape))
                rows.append(torch.cat(row, 3))
            whole = torch.cat(rows, 2)
        x = whole[:, :, :height, :width]
        if level < 3:
            x = F.conv2d(x, state[f"levels.{level}.downsample.reduction.0.weight"], None, 2, 1)
    return norm(x, "norm").mean((2, 3)) @ state["head.weight"].T + state["head.bias"]
