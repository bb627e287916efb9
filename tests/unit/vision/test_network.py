"""The network against the published one's formulas in float64, and laws that hold for any weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vision_oracle import SMALL, logits, mixer, published_state

from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.blocks import DropPath, from_windows, to_windows
from megatron_ext.vision.mixer import MambaVisionMixer
from megatron_ext.vision.network import PLAIN, Network
from megatron_ext.vision.weights import from_published


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(64, 64), (75, 42)], ids=str)
def test_logits_are_the_published_networks(size: tuple[int, int]) -> None:
    """With its weights, at sizes that windows divide and do not."""
    model = replace(SMALL, layer_scale=1.0)
    state = published_state(model)
    network = Network(model).double().eval()
    network.load_state_dict(from_published(state, model))
    images = normal(2, 3, *size)
    torch.testing.assert_close(network(images), logits(images, state, model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arm", ["concatenated", "gated", "one-branch", "causal"])
def test_arms_of_the_mixer(arm: str) -> None:
    """Forward and all gradients, in float64, against the formula on the published layout."""
    model = replace(SMALL, mixer=arm)
    ours = MambaVisionMixer(model, 2, PLAIN).double()
    parameters = {name: normal(*p.shape, seed=i).mul(0.5) for i, (name, p) in enumerate(ours.named_parameters())}
    ours.load_state_dict(parameters)
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    pairs = leaves["in_proj.weight"].unflatten(0, (-1, 2))
    theirs = {"in_proj.weight": torch.cat([pairs[:, 0], pairs[:, 1]])}
    convolved = leaves["conv_weight"]
    if arm in ("concatenated", "gated"):
        theirs |= {"conv1d_x.weight": convolved[0::2], "conv1d_z.weight": convolved[1::2]}
    else:
        theirs["conv1d_x.weight"] = convolved
    out = leaves["out_proj.weight"]
    theirs["out_proj.weight"] = torch.cat([out[:, 0::2], out[:, 1::2]], 1) if arm == "concatenated" else out
    theirs["dt_proj.bias"] = leaves["dt_proj.bias"] / 2
    theirs |= {name: leaves[name] for name in ("x_proj.weight", "dt_proj.weight", "D")}
    theirs["A_log"] = leaves["A_log"].unflatten(0, (-1, model.state))
    x = normal(2, 9, 32, seed=99)
    expected = mixer(x, theirs, arm)
    got = ours(x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(got.square().sum(), list(ours.parameters()))
    right = torch.autograd.grad(expected.square().sum(), [leaves[name] for name, _ in ours.named_parameters()])
    for (name, _), a, b in zip(ours.named_parameters(), gradients, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (3, 9), (1, 1)], ids=str)
def test_windows_and_back(size: tuple[int, int]) -> None:
    """Whole windows or not: each is a square of the image filled with zeros, and pixels come back where they were."""
    x = normal(2, 3, *size)
    windows = to_windows(x, 4)
    filled = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
    expected = [
        filled[b, :, i : i + 4, j : j + 4].flatten(1).T
        for b in range(2) for i in range(0, filled.shape[2], 4) for j in range(0, filled.shape[3], 4)
    ]  # fmt: skip
    assert torch.equal(windows, torch.stack(expected))
    assert torch.equal(from_windows(windows, 4, *size), x)


def test_features_and_any_resolution() -> None:
    network = Network(SMALL).eval()
    for height, width in ((64, 64), (33, 70), (8, 8)):
        features = network.forward_features(torch.zeros(1, 3, height, width))
        for index, (stride, feature) in enumerate(zip((4, 8, 16, 32), features, strict=True)):
            assert feature.shape[:2] == (1, SMALL.channels(index))
            assert feature.shape[2:] == (-(-height // stride), -(-width // stride))


def test_channels_that_lie_together_stay_so() -> None:
    """The same features to rounding, and no convolution has to lay them down anew."""
    network, images = Network(SMALL).double().eval(), normal(2, 3, 75, 96)
    expected = network.forward_features(images)
    found = network.forward_features(images.contiguous(memory_format=torch.channels_last))
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right)
        assert ours.is_contiguous(memory_format=torch.channels_last) or ours.stride(1) == 1


def test_laws_of_images() -> None:
    """Rows of a batch do not see each other; a flip is not the identity, and twice it is."""
    network, images = Network(SMALL).double().eval(), normal(3, 3, 64, 64)
    once = network(images)
    torch.testing.assert_close(network(images.flip(0)).flip(0), once)
    assert not torch.allclose(network(images.flip(3)), once)
    assert torch.equal(network(images.flip(3).flip(3)), once)


def test_drop_path_leaves_out_and_scales() -> None:
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    found = drop(x)
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (found == found[:, :1, :1]).all()
    assert found.mean().item() == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is x
    assert replace(SMALL, drop_path=0.5).drop_paths == [[0.0], [0.1], [0.2, 0.3], [0.4, 0.5]]


def test_step_sizes_at_the_beginning() -> None:
    """As shipped, all of them .69; as Mamba has it, spread over .001 to .1."""
    shipped = Network(SMALL).stages[2].blocks[0].mixer.dt_proj  # type: ignore[index, union-attr]
    assert torch.equal(F.softplus(shipped.bias), torch.full_like(shipped.bias, 2.0).log())
    proper = Network(replace(SMALL, dim=64, head_dim=32, dt_init="mamba")).stages[2].blocks[0].mixer.dt_proj  # type: ignore[index, union-attr]
    steps = F.softplus(proper.bias)
    assert 1e-3 * 0.99 < steps.min() < 3e-3
    assert 3e-2 < steps.max() < 0.1 * 1.01
    assert proper.weight.abs().max() <= proper.weight.shape[1] ** -0.5


def test_what_weight_decay_leaves_alone() -> None:
    """By Megatron's rule and timm's, what has one dimension: norms, biases, and the published code's two exceptions."""
    decayed = {name.split(".")[-1] for name, p in Network(SMALL).named_parameters() if p.dim() > 1}
    assert decayed == {"weight", "conv_weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_in_either_precision(dtype: torch.dtype) -> None:
    """Gradients reach every parameter; statistics stay float32 and move."""
    network: Network = Network(SMALL).to(dtype)
    network(torch.randn(4, 3, 64, 64, dtype=dtype)).float().logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network.norm.running_mean.dtype == torch.float32  # type: ignore[union-attr]
    assert network.norm.running_mean.abs().sum() > 0  # type: ignore[union-attr, operator]


def test_models_are_values() -> None:
    assert MambaVision(**SMALL.to_dict()) == SMALL
