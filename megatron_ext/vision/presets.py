"""The published MambaVision networks, exactly, and tiny ones for a CPU."""

from dataclasses import dataclass, replace

from megatron_ext.vision.architecture import MambaVision


@dataclass(frozen=True)
class Published:
    """A published network.

    Attributes:
        model: The network.
        parameters: Millions of parameters, as published.
        multiply_adds: Thousands of millions of multiply-adds an image, as published (under the name FLOPs).
        top_1: Published share of ImageNet-1K's validation images that are classified rightly, percent.
    """

    model: MambaVision
    parameters: float
    multiply_adds: float
    top_1: float


def _pattern(*depths: int) -> str:
    """Two stages of convolutions, and two whose first half, or one more, are mixers."""
    return "/".join(
        "C" * depth if stage < 2 else "M" * (depth - depth // 2) + "S" * (depth // 2)
        for stage, depth in enumerate(depths)
    )


_T = MambaVision(pattern=_pattern(1, 3, 8, 4), drop_path=0.2)
_B = MambaVision(pattern=_pattern(3, 3, 10, 5), dim=128, stem=64, head_dim=64, layer_scale=1e-5, drop_path=0.3)
_L = replace(_B, dim=196, head_dim=49)

# Table 1 of arXiv 2407.08083v2 at 224 pixels; L3 at 256, after pre-training on ImageNet-21K, of the published code.
PUBLISHED = {
    "mambavision-t": Published(_T, 31.8, 4.4, 82.3),
    "mambavision-t2": Published(replace(_T, pattern=_pattern(1, 3, 11, 4)), 35.1, 5.1, 82.7),
    "mambavision-s": Published(
        replace(_T, pattern=_pattern(3, 3, 7, 5), dim=96, stem=64, head_dim=48), 50.1, 7.5, 83.3
    ),
    "mambavision-b": Published(_B, 97.7, 15.0, 84.2),
    "mambavision-l": Published(_L, 227.9, 34.9, 85.0),
    "mambavision-l2": Published(replace(_L, pattern=_pattern(3, 3, 12, 5)), 241.5, 37.5, 85.3),
    "mambavision-l3": Published(
        replace(
            _B, pattern=_pattern(3, 3, 20, 10), dim=256, window=16, last_window=8, resolution=256, drop_path=0.5
        ),
        739.6, 122.3, 87.3,
    ),
}  # fmt: skip

# For 32 x 32 pixels; 8 x 8 in the first stage, one in the last.
_NANO = MambaVision(
    pattern="C/C/MMSS/MS", dim=16, stem=16, head_dim=16, window=4, last_window=2, state=4, resolution=32, classes=10
)

PRESETS = {name: published.model for name, published in PUBLISHED.items()} | {"mambavision-nano": _NANO}
