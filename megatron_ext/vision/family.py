"""MambaVision as a model family: flags `--mambavision-*` and presets to Megatron's module, split over ranks."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.families.family import DataclassFamily
from megatron_ext.vision import lamb
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.average import WeightAverage, buffer_name
from megatron_ext.vision.beginning import fill, read_weights
from megatron_ext.vision.blocks import BatchNorm
from megatron_ext.vision.linears import MegatronLinears, from_the_seed, sharded_tensors
from megatron_ext.vision.network import Network
from megatron_ext.vision.presets import PRESETS


def build(config: Any, model: MambaVision, groups: Any, decay: float = 0.0, frozen: int = 0) -> Any:
    """The network on tensor-parallel ranks; images are normalised over the batches of all data-parallel ones.

    Args:
        config: Megatron's `TransformerConfig`.
        model: The network.
        groups: Process groups.
        decay: Of the average of its weights; 0 for none.
        frozen: Stages that are not trained, from the first on, with what is before them; their statistics stay, too.
    """
    import torch
    from megatron.core.transformer.module import MegatronModule

    class TrainedNetwork(MegatronModule):
        """The network as Megatron trains and saves it."""

        def __init__(self) -> None:
            super().__init__(config)
            with from_the_seed():
                self.backbone = Network(model, MegatronLinears(config, groups.tp))
            for module in self.backbone.modules():
                if isinstance(module, BatchNorm):
                    module.group = groups.dp
            self.average = WeightAverage(self.backbone, decay) if decay else None
            self._frozen = self.backbone.first_stages(frozen)
            for module in self._frozen:
                module.requires_grad_(False)

        def train(self, mode: bool = True) -> Any:
            """What is frozen stays in evaluation mode."""
            super().train(mode)
            for module in self._frozen:
                module.eval()
            return self

        def set_input_tensor(self, input_tensor: Any) -> None:
            """There is one stage."""

        def forward(self, image: Tensor, averaged: bool = False) -> Tensor:
            """Logits, of the weights or of their average; channels lie together, of which convolutions are faster."""
            network = self.average if averaged and self.average is not None else self.backbone
            return network(image.contiguous(memory_format=torch.channels_last))

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: dict | None = None
        ) -> dict[str, Any]:
            """Each rank's parts of all tensors."""
            return sharded_tensors(
                self, groups, prefix, sharded_offsets,
                lambda name: "average." + buffer_name(name.removeprefix("backbone.")),
            )  # fmt: skip

    return TrainedNetwork()


class VisionFamily(DataclassFamily):
    """MambaVision, with the average of its weights where `--average-decay` asks for it, and LAMB."""

    def add_flags(self, parser: Any) -> None:
        """The fields of the dataclass; and one more optimizer."""
        super().add_flags(parser)
        lamb.offer(parser)

    def check(self, args: Any, loads: bool) -> None:
        """What the dataclass refuses, flags of a language model, and what LAMB does not go with."""
        super().check(args, loads)
        if args.optimizer == "lamb" and args.fp16:
            what = "Megatron scales no losses for its further optimizers, of which --optimizer lamb is one"
            raise ConfigError(what, got="--fp16", legal="--bf16, or --optimizer adam")
        if args.optimizer == "lamb" and args.use_distributed_optimizer:
            what = "LAMB needs whole weights, which the distributed optimizer divides anywhere"
            raise ConfigError(what, got="--use-distributed-optimizer", legal="none, or --optimizer adam")

    def config(self, args: Any, model: MambaVision) -> Any:
        """A configuration that carries the network to `build`, and what it begins with."""
        config = super().config(args, model)
        if getattr(args, "ext_begins_from", None) is not None:
            config.pre_wrap_hooks = [partial(_begin, args), *config.pre_wrap_hooks]
        more = {"decay": getattr(args, "average_decay", 0.0), "frozen": getattr(args, "freeze_stages", 0)}
        return replace(config, build=partial(build, **more))


def _begin(args: Any, chunks: list[Any]) -> list[Any]:
    (chunk,) = chunks
    weights = read_weights(Path(args.ext_begins_from), chunk.backbone.model, args.pretrained_averaged)
    fill(chunks, weights, args.ext_new_classifier, chunk.pg_collection.tp)
    return chunks


FAMILY = VisionFamily("mambavision", MambaVision, build, presets=PRESETS)
