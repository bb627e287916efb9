"""Activation importance and Block Influence, measured by hooks in one forward pass, the same on every parallel layout.

Width (arXiv 2407.14679): an activation is aggregated by the mean of its magnitude over the sequence, then
by the L2 norm over the calibration samples.

- hidden channel: the output of each sub-layer's pre-norm, summed over sub-layers;
- FFN neuron: the input of the down projection;
- query head: the L2 norm of the head's output, before the output projection;
- Mamba-2 head and head channel: the `x` part of the input projection (Minitron-SSM, arXiv 2504.11409).

Depth: Block Influence, `1 - E[cos(input, output)]` over tokens (arXiv 2407.14679), for each sub-layer and
for each block.

Shapes: s sequence (this rank's part), b micro-batch, h hidden, f FFN, n heads, d channels; n and f are this rank's.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.models.config import Architecture
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP, Pattern
from megatron_ext.pruning import scores as names

METRIC = "l2 over the batch, mean over the sequence; block influence by cosine"
_FUSED_NORM = {MAMBA: "mixer.in_proj", ATTENTION: "self_attention.linear_qkv", MLP: "mlp.linear_fc1"}


def check_borders(pattern: Pattern) -> None:
    """Refuse a pipeline split inside a block, whose influence no stage could measure.

    Raises:
        ConfigError: Names the border.
    """
    starts = {block[0] for block in pattern.blocks}
    for border in pattern.borders:
        if border not in starts:
            raise ConfigError(
                f"the pipeline border before sub-layer {border} cuts a block in two", got=str(pattern),
                legal=f"borders before a mixer, such as {pattern.split(len(pattern.borders) + 1)}",
            )  # fmt: skip


def pre_norm(linear: torch.nn.Module, x: Tensor, config: Any) -> Tensor:
    """The output of the norm that is fused into a projection, from the projection's input, (..., h) both.

    Transformer Engine and plain torch keep the norm's parameters under the same names.
    """
    weight: Any = linear.layer_norm_weight
    bias: Any = getattr(linear, "layer_norm_bias", None)
    gamma = weight.float() + 1 if config.layernorm_zero_centered_gamma else weight.float()
    if config.normalization == "RMSNorm":
        return F.rms_norm(x.float(), gamma.shape, gamma, config.layernorm_epsilon)
    return F.layer_norm(x.float(), gamma.shape, gamma, bias.float(), config.layernorm_epsilon)


def influence(before: Float[Tensor, "s b h"], after: Float[Tensor, "s b h"]) -> Float[Tensor, "2"]:
    """The sum of cosines between two hidden states, and the number of tokens, in float64."""
    cosines = F.cosine_similarity(before.float(), after.float(), dim=-1)
    return torch.stack([cosines.double().sum(), torch.tensor(cosines.numel(), device=before.device).double()])


class Importance:
    """Hooks on the chunks of one rank that accumulate scores while calibration data runs through the model.

    Args:
        chunks: This rank's `HybridModel`s, unwrapped.
        architecture: The whole model.

    Raises:
        ConfigError: A pipeline border cuts a block in two.
    """

    def __init__(self, chunks: Iterable[Any], architecture: Architecture) -> None:
        self.architecture = architecture
        self._squares: dict[str, Tensor] = {}
        self._cosines: dict[str, Tensor] = {}
        self._samples = 0
        self._unit_input: Tensor | None = None
        self._block_input: Tensor | None = None
        self._handles: list[Any] = []
        self._ends = {block[-1]: number for number, block in enumerate(architecture.layers.blocks)}
        self._starts = {block[0] for block in architecture.layers.blocks}
        for chunk in chunks:
            self._groups = chunk.pg_collection
            self._config = chunk.config
            for layer in chunk.decoder.layers:
                self._watch(layer, layer.layer_number - 1)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, layer: torch.nn.Module, index: int) -> None:
        kind = self.architecture.pattern[index]
        linear = layer.get_submodule(_FUSED_NORM[kind])
        self._before(linear, lambda x: self._hidden(linear, x, index))
        if kind == MLP:
            self._before(layer.get_submodule("mlp.linear_fc2"), lambda x: self._add(names.ffn(index), x.float().abs()))
        elif kind == ATTENTION:
            heads, channels = layer.get_submodule("self_attention"), self.architecture.kv_channels
            self._before(
                heads.get_submodule("linear_proj"),
                lambda x: self._add(names.query_head(index), x.float().unflatten(-1, (-1, channels)).norm(dim=-1)),
            )
        elif kind == MAMBA:
            self._handles.append(linear.register_forward_hook(self._mamba(layer.get_submodule("mixer"), index)))
        self._handles.append(layer.register_forward_pre_hook(self._enter(index), with_kwargs=True))
        self._handles.append(layer.register_forward_hook(self._leave(index), with_kwargs=True))

    def _before(self, module: torch.nn.Module, see: Callable[[Tensor], None]) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda _, args: see(args[0])))

    def _hidden(self, linear: torch.nn.Module, x: Tensor, index: int) -> None:
        # Under sequence parallelism each tensor rank holds a part of the sequence.
        normed = pre_norm(linear, x, self._config).abs()
        self._add(f"{names.HIDDEN}.{index}", normed, split=self._config.sequence_parallel)

    def _mamba(self, mixer: Any, index: int) -> Callable[..., None]:
        inner, channels = mixer.d_inner_local_tp, self.architecture.mamba_head_dim

        def see(_: Any, __: Any, output: Any) -> None:
            projected = output[0] if isinstance(output, tuple) else output  # s b (z x B C dt)
            x = projected[..., inner : 2 * inner].float().abs()
            self._add(names.mamba(index), x.unflatten(-1, (-1, channels)))

        return see

    @torch.no_grad()
    def _add(self, name: str, magnitude: Float[Tensor, "s b *axes"], split: bool = False) -> None:
        """Add one micro-batch: the mean over the whole sequence, squared, summed over the samples."""
        total = magnitude.sum(dim=0, dtype=torch.float64)
        length = magnitude.shape[0]
        for group in ([self._groups.tp] if split else []) + [self._groups.cp]:
            if group.size() > 1:
                dist.all_reduce(total, group=group)
                length *= group.size()
        square = (total / length).square().sum(dim=0)
        if name in self._squares:
            self._squares[name] += square
        else:
            self._squares[name] = square

    def _enter(self, index: int) -> Callable[..., None]:
        def see(_: Any, args: Any, kwargs: Any) -> None:
            self._unit_input = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if index in self._starts:
                self._block_input = self._unit_input

        return see

    def _leave(self, index: int) -> Callable[..., None]:
        def see(_: Any, __: Any, ___: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            assert self._unit_input is not None
            self._count(f"{names.INFLUENCE}.{index}", self._unit_input, after)
            if index in self._ends:
                assert self._block_input is not None
                self._count(f"{names.BLOCK_INFLUENCE}.{self._ends[index]}", self._block_input, after)

        return see

    @torch.no_grad()
    def _count(self, name: str, before: Tensor, after: Tensor) -> None:
        sums = influence(before, after)
        self._cosines[name] = self._cosines[name] + sums if name in self._cosines else sums

    def gather(self) -> dict[str, Tensor] | None:
        """The scores of the whole model, float32, on rank 0; None elsewhere. A collective of all ranks.

        Sums over samples go over the data-parallel ranks, sums over tokens also over those that split a sequence;
        heads and neurons are put together over the tensor-parallel ranks, layers over the pipeline.
        """
        groups = self._groups
        for value in self._squares.values():
            dist.all_reduce(value, group=groups.dp)
        for value in self._cosines.values():
            for group in (groups.dp, groups.cp, groups.tp):  # without sequence parallelism TP only repeats the count
                dist.all_reduce(value, group=group)
        here = None
        if groups.dp.rank() == 0 and groups.cp.rank() == 0:
            here = (groups.tp.rank(), {k: v.cpu() for k, v in (self._squares | self._cosines).items()})
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, here)
        return self._assemble([part for part in parts if part is not None]) if dist.get_rank() == 0 else None

    def _assemble(self, parts: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
        merged: dict[str, list[Tensor]] = {}
        for _, values in sorted(parts, key=lambda part: part[0]):
            for name, value in values.items():
                merged.setdefault(name, []).append(value)
        blocks = range(len(self.architecture.layers.blocks))
        units = range(len(self.architecture.pattern))
        result = {
            names.HIDDEN: torch.stack([merged.pop(f"{names.HIDDEN}.{i}")[0].sqrt() for i in units]).sum(0),
            names.INFLUENCE: _influence([merged.pop(f"{names.INFLUENCE}.{i}")[0] for i in units]),
            names.BLOCK_INFLUENCE: _influence([merged.pop(f"{names.BLOCK_INFLUENCE}.{i}")[0] for i in blocks]),
        }
        result |= {name: torch.cat(shards).sqrt() for name, shards in merged.items()}
        return {name: value.float() for name, value in result.items()}


def _influence(sums: list[Tensor]) -> Tensor:
    return torch.stack([1 - total[0] / total[1] for total in sums])
