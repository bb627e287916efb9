"""What a MambaVision network is, as one value: a pattern with its sizes, its parameters and its operations.

Source: Hatamizadeh and Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone", arXiv 2407.08083v2.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any, Literal, get_args

from megatron_ext.errors import ConfigError
from megatron_ext.options.fields import option

Arm = Literal["concatenated", "gated", "one-branch", "causal"]
KERNEL = 3  # of every convolution
WIDTHS = ("conv", "heads", "inner", "hidden")
"""Inside a block: channels between its convolutions, attention heads, channels of a mixer's branch, of an MLP."""


@dataclass(frozen=True)
class MambaVision:
    """A MambaVision image classifier."""

    pattern: str = option("C/CCC/MMMMSSSS/MMSS", "Blocks of the four stages: C convolution, M mixer, S self-attention.")
    dim: int = option(80, "Channels of the first stage; each stage after it has twice as many.")
    stem: int = option(32, "Channels between the two convolutions of the stem.")
    head_dim: int = option(40, "Channels of an attention head.")
    window: int = option(14, "Side of the third stage's windows, in its own pixels.")
    last_window: int = option(7, "Side of the fourth stage's windows.")
    state: int = option(8, "States of each channel of a mixer.")
    mlp_ratio: float = option(4.0, "Hidden channels of an MLP, as a multiple of the stage's.")
    mixer: Arm = option("concatenated", "What a mixer makes of its two branches; see vision/mixer.py.")
    dt_init: Literal["shipped", "mamba"] = option(
        "shipped", "Step sizes at the beginning: about .69 as the published code has it, or Mamba's .001 to .1."
    )
    layer_scale: float | None = option(None, "First value of the factor on each residual; none by default.")
    drop_path: float = option(0.0, "Share of images that skip the last block; it rises from 0 block by block.")
    resolution: int = option(224, "Side of the images.")
    image_channels: int = option(3, "Channels of the images.")
    classes: int = option(1000, "Classes.")
    widths: str | None = option(
        None,
        "What is left inside the blocks of pruned stages: 'conv=8/12/-/- heads=-/-/2/4 inner=-/-/24/48 hidden=-/-/96/-'"
        ", - where a stage is whole.",
    )

    def __post_init__(self) -> None:
        """Find what cannot be built.

        Raises:
            ConfigError: Says what.
        """
        if not re.fullmatch(r"(C*|[MS]*)(/(C*|[MS]*)){3}", self.pattern):
            legal = "four stages separated by /, each of C alone or of M and S, such as C/CCC/MMMMSSSS/MMSS"
            raise ConfigError("no pattern of a MambaVision network", got=self.pattern, legal=legal)
        for name in ("dim", "stem", "head_dim", "window", "last_window", "state", "resolution", "classes"):
            if getattr(self, name) < 1:
                flag = f"--mambavision-{name.replace('_', '-')}"
                raise ConfigError(f"{flag} is too small", got=getattr(self, name), legal="at least 1")
        self._check_widths()
        if self.hidden(0) < 1:
            raise ConfigError("--mambavision-mlp-ratio leaves an MLP without channels", got=self.mlp_ratio, legal="4.0")
        for index, stage in enumerate(self.stages):
            channels = self.channels(index)
            if "S" in stage and channels % self.head_dim:
                what = f"attention heads do not divide the {channels} channels of stage {index + 1}"
                raise ConfigError(what, got=f"--mambavision-head-dim {self.head_dim}", legal=f"a divisor of {channels}")
            if "M" in stage and channels % 2:
                raise ConfigError("a mixer's two branches halve its channels", got=channels, legal="an even number")
        for name, legal in (("mixer", get_args(Arm)), ("dt_init", ("shipped", "mamba"))):
            if getattr(self, name) not in legal:
                raise ConfigError(f"no such {name}", got=getattr(self, name), legal=", ".join(legal))
        if not 0 <= self.drop_path < 1:
            raise ConfigError("--mambavision-drop-path is a share", got=self.drop_path, legal="0 to less than 1")

    @property
    def stages(self) -> list[str]:
        """The patterns of the four stages."""
        return self.pattern.split("/")

    def channels(self, stage: int) -> int:
        """Of a stage, counted from 0."""
        return self.dim * 2**stage

    def window_of(self, stage: int) -> int:
        """The side of a stage's windows; the first three have one size in their own pixels."""
        return self.last_window if stage == 3 else self.window

    def conv(self, stage: int) -> int:
        """Channels between the two convolutions of a stage's blocks."""
        return self._width("conv", stage)

    def heads(self, stage: int) -> int:
        """Heads of a stage's attention."""
        return self._width("heads", stage)

    def inner(self, stage: int) -> int:
        """Channels of each branch of a stage's mixers."""
        return self._width("inner", stage)

    def hidden(self, stage: int) -> int:
        """Hidden channels of a stage's MLPs."""
        return self._width("hidden", stage)

    def whole(self, name: str, stage: int) -> int:
        """One of `WIDTHS` where nothing is pruned."""
        c = self.channels(stage)
        return {"conv": c, "heads": c // self.head_dim, "inner": c // 2, "hidden": int(c * self.mlp_ratio)}[name]

    def with_widths(self, widths: Mapping[str, Sequence[int]]) -> "MambaVision":
        """The same with these `WIDTHS`, by name and stage; those of other names are whole."""
        found = []
        for name in WIDTHS:
            whole = [self.whole(name, stage) for stage in range(4)]
            own = widths.get(name, whole)
            if list(own) != whole:
                found.append(f"{name}=" + "/".join("-" if a == b else str(a) for a, b in zip(own, whole, strict=True)))
        return replace(self, widths=" ".join(found) or None)

    def _width(self, name: str, stage: int) -> int:
        given = self._given[name][stage] if name in self._given else None
        return self.whole(name, stage) if given is None else given

    @cached_property
    def _given(self) -> dict[str, list[int | None]]:
        """What `widths` says, by name and stage."""
        found = {}
        for word in (self.widths or "").split():
            name, _, sizes = word.partition("=")
            found[name] = [None if size == "-" else int(size) for size in sizes.split("/")]
        return found

    def _check_widths(self) -> None:
        size = r"(-|[1-9]\d*)"
        for word in (self.widths or "").split():
            if not re.fullmatch(rf"({'|'.join(WIDTHS)})={size}(/{size}){{3}}", word):
                legal = f"{', '.join(WIDTHS)}: four numbers or - , such as hidden=-/-/96/200"
                raise ConfigError("no widths of a MambaVision network", got=word, legal=legal)

    def dt_rank(self, stage: int) -> int:
        """The width of the bottleneck from which step sizes are made."""
        return ceil(self.channels(stage) / 16)

    @property
    def drop_paths(self) -> list[list[float]]:
        """The drop path rate of each block of each stage."""
        blocks = sum(map(len, self.stages))
        rates = iter(self.drop_path * i / max(1, blocks - 1) for i in range(blocks))
        return [[next(rates) for _ in stage] for stage in self.stages]

    def check_layout(self, tp: int) -> None:
        """Find what tensor parallelism does not divide.

        Raises:
            ConfigError: Says what.
        """
        for index, stage in enumerate(self.stages):
            shares = {"C": 0, "S": self.heads(index), "M": self.inner(index)}
            for kind, what in (("S", "attention heads"), ("M", "channels of a mixer's branch")):
                if kind in stage and shares[kind] % tp:
                    what = f"the {what} of stage {index + 1} do not divide over tensor-parallel ranks"
                    raise ConfigError(what, got=f"{shares[kind]} / {tp}", legal="a divisor")
            if set(stage) & set("MS") and self.hidden(index) % tp:
                what = f"the hidden channels of stage {index + 1}'s MLPs do not divide over tensor-parallel ranks"
                raise ConfigError(what, got=f"{self.hidden(index)} / {tp}", legal="a divisor")

    def to_dict(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    def num_parameters(self) -> int:
        """Weights and biases in all, batch norms' scales and shifts among them, their running statistics not."""
        taps = KERNEL * KERNEL
        total = taps * self.stem * (self.image_channels + self.dim) + 2 * (self.stem + self.dim)
        for index, stage in enumerate(self.stages):
            c = self.channels(index)
            scale = 0 if self.layer_scale is None else 2 * c
            total += stage.count("C") * (2 * taps * c * self.conv(index) + 3 * (self.conv(index) + c))
            mlp = 2 * c * self.hidden(index) + self.hidden(index) + c
            total += (len(stage) - stage.count("C")) * (mlp + 4 * c + scale)
            heads = self.heads(index) * self.head_dim
            total += stage.count("S") * (4 * c * heads + 3 * heads + c)
            total += stage.count("M") * self._mixer_weights(index)
            total += taps * c * 2 * c if index < 3 else 0
        return total + 2 * self.channels(3) + (self.channels(3) + 1) * self.classes

    def _mixer_weights(self, stage: int) -> int:
        c, inner, rank = self.channels(stage), self.inner(stage), self.dt_rank(stage)
        convolved = 2 * inner if self.mixer in ("concatenated", "gated") else inner
        out = (2 * inner if self.mixer == "concatenated" else inner) * c
        scan = inner * (rank + 2 * self.state) + (rank + 1) * inner + inner * (self.state + 1)
        return c * 2 * inner + convolved * KERNEL + scan + out

    def multiply_adds(self, resolution: int | None = None) -> dict[str, int]:
        """Of one image: `layers`, which is convolutions and linear layers; `attention`, its two products; `scan`.

        What is published as FLOPs is `layers`, to 1.4%: 4.4 thousand million for T where this is 4.46, and 34.9 for L
        where it is 34.84. Its tool is not named, and it is not the same set of operations for all. Padding to whole
        windows counts.
        """
        side = ceil((resolution or self.resolution) / 2)
        taps, found = KERNEL * KERNEL, {"layers": 0, "attention": 0, "scan": 0}
        found["layers"] += taps * self.image_channels * self.stem * side**2
        side = ceil(side / 2)
        found["layers"] += taps * self.stem * self.dim * side**2
        for index, stage in enumerate(self.stages):
            c, window = self.channels(index), self.window_of(index)
            tokens, length = (ceil(side / window) * window) ** 2, window**2
            found["layers"] += stage.count("C") * 2 * taps * c * self.conv(index) * side**2
            found["layers"] += (len(stage) - stage.count("C")) * 2 * c * self.hidden(index) * tokens
            heads, inner = self.heads(index) * self.head_dim, self.inner(index)
            found["layers"] += stage.count("S") * 4 * c * heads * tokens
            without = inner * (self.state + 2)  # step size's bias, A and D
            found["layers"] += stage.count("M") * (self._mixer_weights(index) - without) * tokens
            found["attention"] += stage.count("S") * 2 * length * heads * tokens
            found["scan"] += stage.count("M") * 3 * inner * self.state * tokens
            if index < 3:
                side = ceil(side / 2)
                found["layers"] += taps * 2 * c * c * side**2
        found["layers"] += self.channels(3) * self.classes
        return found
