"""A backbone with heads as a model family: flags `--mambavision-*` and the heads' own to Megatron's module."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.start import Start
from megatron_ext.errors import CheckpointError
from megatron_ext.families.family import DataclassFamily
from megatron_ext.options.fields import add_options, read_options, to_flags
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.blocks import BatchNorm
from megatron_ext.vision.family import FAMILY as CLASSIFIERS
from megatron_ext.vision.linears import Linears, MegatronLinears, from_the_seed, sharded_tensors

Make = Callable[[Any, Linears], nn.Module]


@dataclass(frozen=True)
class WithHeads:
    """A backbone and its heads.

    Attributes:
        backbone: Its `classes` are those of the heads, its `resolution` the side of training images.
        heads: Sizes of the heads, a dataclass of flags.
        count: The parameters of both.
    """

    backbone: MambaVision
    heads: Any
    count: Callable[["WithHeads"], int]

    def num_parameters(self) -> int:
        """Weights and biases in all."""
        return self.count(self)

    def to_dict(self) -> dict[str, Any]:
        """Every field of both."""
        return self.backbone.to_dict() | {f"heads_{name}": value for name, value in vars(self.heads).items()}

    def check_layout(self, tp: int) -> None:
        """Find what tensor parallelism does not divide in the backbone; heads are whole on each rank."""
        self.backbone.check_layout(tp)


class HeadsFamily(DataclassFamily):
    """A family of backbones with heads of one kind.

    Args:
        name: Of the family; also the prefix of the heads' flags.
        heads: Their dataclass of flags.
        make: From a `WithHeads` and a way to make linear layers to the network, whose `backbone` is a `Backbone`.
        presets: Backbones by name.
        defaults: What heads want of a backbone that was trained to classify: `classes`, `resolution`.
    """

    def __init__(
        self, name: str, heads: type, make: Make, presets: dict[str, MambaVision], defaults: dict[str, int]
    ) -> None:
        def build(config: Any, model: WithHeads, groups: Any) -> Any:
            return _trained(config, groups, lambda linears: make(model, linears))

        known = {preset: self._with(replace(model, **defaults), heads()) for preset, model in presets.items()}
        super().__init__(name, heads, build, presets=known)
        for field, value in {"make": make, "defaults": defaults}.items():
            object.__setattr__(self, field, value)  # the dataclass is frozen

    def _with(self, backbone: MambaVision, heads: Any) -> WithHeads:
        return WithHeads(backbone, heads, lambda model: _count(self.make, model))  # type: ignore[attr-defined]

    def add_flags(self, parser: ArgumentParser) -> None:
        """Those of the backbone and of the heads."""
        add_options(parser, MambaVision, CLASSIFIERS.name)
        add_options(parser, self.model, self.name)

    def model_flags(self, model: WithHeads) -> list[str]:
        """Both as a command line."""
        return [*to_flags(model.backbone, CLASSIFIERS.name), *to_flags(model.heads, self.name)]

    def flags(self, early: Namespace, start: Start | None) -> tuple[list[str], str]:
        """Of a preset, or of a checkpoint; `--preset` may also name a trained classifier, for its sizes."""
        if early.preset is not None and early.preset not in self.presets and Path(early.preset).is_dir():
            step = layout.find(early.preset)
            args: Any = layout.common(step.path).get("args")
            if getattr(args, "ext_family", None) == CLASSIFIERS.name:
                model = self._with(replace(CLASSIFIERS.on_disk(step), **self.defaults), self.model())  # type: ignore[attr-defined]
                return [*self.megatron_flags, *self.model_flags(model)], str(step.path)
        return super().flags(early, start)

    def from_args(self, args: Namespace) -> WithHeads:
        """The backbone and the heads with the values of their flags."""
        return self._with(CLASSIFIERS.from_args(args), read_options(args, self.model, self.name))

    def read_network(self, path: Path) -> nn.Module:
        """A trained checkpoint as a plain network in evaluation mode, whatever layout saved it.

        Raises:
            CheckpointError: There is none, it holds another kind of model, or it is damaged.
        """
        step = layout.find(path)
        args: Any = layout.common(step.path).get("args")
        if (held := getattr(args, "ext_family", None)) != self.name:
            raise CheckpointError("no such network", got=f"{step.path}: {held or 'a language model'}", legal=self.name)
        from megatron_ext.vision.network import PLAIN

        network, reader = self.make(self.from_args(args), PLAIN).eval(), CheckpointReader(step.path)  # type: ignore[attr-defined]
        network.load_state_dict({name: reader.read(f"network.{name}") for name in network.state_dict()})
        return network


def _count(make: Make, model: WithHeads) -> int:
    import torch

    from megatron_ext.vision.network import PLAIN

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make(model, PLAIN).parameters())


def _trained(config: Any, groups: Any, make: Callable[[Linears], nn.Module]) -> Any:
    """A network as Megatron trains and saves it; features are normalised over all data-parallel ranks' batches."""
    from megatron.core.transformer.module import MegatronModule

    class Trained(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            with from_the_seed():
                self.network = make(MegatronLinears(config, groups.tp))
            for module in self.network.modules():
                if isinstance(module, BatchNorm):
                    module.group = groups.dp

        def set_input_tensor(self, input_tensor: Any) -> None:
            """There is one stage."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """What the network makes of them."""
            return self.network(*args, **kwargs)

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: dict | None = None
        ) -> dict[str, Any]:
            """Each rank's parts of all tensors."""
            return sharded_tensors(self, groups, prefix, sharded_offsets)

    return Trained()
