"""Published counts, and counts of the networks themselves."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vision_oracle import SMALL

from megatron_ext.errors import ConfigError
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.network import Network
from megatron_ext.vision.presets import PRESETS, PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_operations_are_the_published_ones(name: str) -> None:
    """Parameters to the last published digit, which for L and L2 is cut off rather than rounded; FLOPs to 1.4%."""
    published = PUBLISHED[name]
    millions = published.model.num_parameters() / 1e6
    assert published.parameters in (round(millions, 1), int(millions * 10) / 10)
    assert published.model.multiply_adds()["layers"] / 1e9 == pytest.approx(published.multiply_adds, rel=0.014)


ARMS = [replace(SMALL, mixer=arm, layer_scale=scale) for arm, scale in (("gated", 1e-5), ("one-branch", None))]


@pytest.mark.parametrize("model", [*PRESETS.values(), *ARMS], ids=[*PRESETS, "gated", "one-branch"])
def test_parameters_are_those_of_the_network(model: MambaVision) -> None:
    with torch.device("meta"):
        network = Network(model)
    assert sum(p.numel() for p in network.parameters()) == model.num_parameters()


@pytest.mark.parametrize("resolution", [64, 75])
def test_operations_are_those_that_torch_counts(resolution: int) -> None:
    """Torch's own counter, on a network of all kinds of blocks and at a size that windows do not divide."""
    network = Network(SMALL).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, resolution, resolution))
    counts = {str(op): flops // 2 for op, flops in counter.get_flop_counts()["Global"].items()}
    layers = sum(counts.get(f"aten.{name}", 0) for name in ("convolution", "addmm", "mm"))
    expected = SMALL.multiply_adds(resolution)
    assert layers == expected["layers"]
    assert counts["aten.bmm"] == expected["attention"] + expected["scan"] // 3  # of the scan only y is a product


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"pattern": "C/C/MS"}, "no pattern"), ({"pattern": "C/C/CM/S"}, "no pattern"), ({"dim": 0}, "too small"),
        ({"mlp_ratio": 0.01}, "without channels"),
        ({"head_dim": 24}, "do not divide the 32 channels of stage 3"), ({"drop_path": 1.0}, "is a share"),
        ({"mixer": "parallel"}, "no such mixer"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(change: dict, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        replace(SMALL, **change)


def test_what_tensor_parallelism_does_not_divide_is_refused() -> None:
    SMALL.check_layout(2)
    with pytest.raises(ConfigError, match="attention heads of stage 3"):
        SMALL.check_layout(8)
    with pytest.raises(ConfigError, match="a mixer's branch of stage 3"):
        replace(SMALL, pattern="C/C/M/M").check_layout(3)
