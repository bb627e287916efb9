"""The whole network: stem, four stages, and a classifier; what it gives are features, or logits.

The stages' features have strides 4, 8, 16 and 32. Any resolution: windows that do not divide it are filled up.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.blocks import BatchNorm, ConvBlock, TokenBlock, convolution, from_windows, to_windows
from megatron_ext.vision.linears import Linears, PlainLinears, fill
from megatron_ext.vision.mixer import MambaVisionMixer

STEM_EPS = 1e-4
PLAIN = PlainLinears()


class Stem(nn.Sequential):
    """Images to a quarter of their height and width, in two convolutions."""

    def __init__(self, model: MambaVision) -> None:
        super().__init__(
            convolution(model.image_channels, model.stem, 2), BatchNorm(model.stem, eps=STEM_EPS), nn.ReLU(),
            convolution(model.stem, model.dim, 2), BatchNorm(model.dim, eps=STEM_EPS), nn.ReLU(),
        )  # fmt: skip


class Stage(nn.Module):
    """Blocks at one resolution.

    Args:
        model: The network.
        index: Counted from 0.
        linears: How linear layers are made.
    """

    def __init__(self, model: MambaVision, index: int, linears: Linears) -> None:
        super().__init__()
        pattern, channels = model.stages[index], model.channels(index)
        self.window = model.window_of(index) if set(pattern) & set("MS") else None
        self.blocks = nn.ModuleList(
            ConvBlock(channels, model.conv(index), rate)
            if kind == "C"
            else TokenBlock(kind, model, index, rate, linears)
            for kind, rate in zip(pattern, model.drop_paths[index], strict=True)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The stage's features."""
        height, width = x.shape[2:]
        if self.window is not None:
            x = to_windows(x, self.window)
        for block in self.blocks:
            x = block(x)
        return x if self.window is None else from_windows(x, self.window, height, width)


class Network(nn.Module):
    """A MambaVision network.

    Args:
        model: Its pattern and sizes.
        linears: How linear layers are made; plain ones by default, for which no process group is needed.
    """

    def __init__(self, model: MambaVision, linears: Linears = PLAIN) -> None:
        super().__init__()
        self.model, self.linears = model, linears
        self.stem = Stem(model)
        self.stages = nn.ModuleList(Stage(model, index, linears) for index in range(4))
        self.downsamples = nn.ModuleList(
            convolution(model.channels(index), model.channels(index + 1), 2) for index in range(3)
        )
        self.norm = BatchNorm(model.channels(3))
        self.head = nn.Linear(model.channels(3), model.classes) if model.classes else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill all weights, from torch's random state; how they are split over ranks makes no difference.

        Linear layers are normal with a deviation of .02, cut at 2, their biases zero; that holds for what makes step
        sizes as well, unless `dt_init` is mamba. Convolutions are torch's own.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
            elif isinstance(module, MambaVisionMixer | nn.LayerNorm | BatchNorm):
                continue
            elif isinstance(getattr(module, "weight", None), nn.Parameter):  # a linear layer of either kind
                fill(module.weight, self.linears, lambda t: nn.init.trunc_normal_(t, std=0.02))  # type: ignore[arg-type]
                if module.bias is not None:
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for module in self.modules():
            if isinstance(module, MambaVisionMixer):
                module.reset_parameters()

    def first_stages(self, count: int) -> list[nn.Module]:
        """So many stages with what is before them: the stem, and what leads from each of them to the next."""
        return [self.stem, *self.stages[:count], *self.downsamples[: count - 1]] if count else []

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """The features of the four stages, at strides 4, 8, 16 and 32."""
        features, x = [], self.stem(x)
        for index, stage in enumerate(self.stages):
            x = stage(x if index == 0 else self.downsamples[index - 1](x))
            features.append(x)
        return features

    def forward_head(self, x: Float[Tensor, "b c h w"], pre_logits: bool = False) -> Float[Tensor, "b _"]:
        """Logits of the last features; with `pre_logits` what the classifier reads."""
        pooled = F.adaptive_avg_pool2d(self.norm(x), 1).flatten(1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits of images."""
        return self.forward_head(self.forward_features(x)[-1])
