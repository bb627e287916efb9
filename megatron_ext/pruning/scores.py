"""What the calibration pass measured: one importance per position of every prunable axis, whatever layout measured it.

Higher is more important. The names, with their shapes:

- `hidden`: `(hidden_size,)`
- `layers.{i}.ffn`: `(ffn_hidden_size,)`, for each MLP; `i` counts sub-layers of the pattern from 0
- `layers.{i}.query_head`: `(num_attention_heads,)`, for each attention layer
- `layers.{i}.mamba`: `(mamba_num_heads, mamba_head_dim)`, for each Mamba-2 layer
- `layers.{i}.state`: `(mamba_num_groups, mamba_state_dim)`, for each Mamba-2 layer
- `layers.{i}.expert`: `(num_experts,)`, for each mixture of experts
- `layers.{i}.expert_ffn`: `(num_experts, moe_ffn_hidden_size)`, for each mixture of experts
- `layers.{i}.shared_ffn`: `(moe_shared_expert_intermediate_size,)`, for each mixture that has a shared expert
- `depth.{metric}`: `(number of sub-layers,)`, for a metric of `DEPTH_METRICS` that is no scan
- `depth.{metric}.blocks`: `(number of blocks,)`, blocks as in `megatron_ext.models.pattern`
- `depth.{metric}.{kind}`: `(number of sub-layers of this kind,)`, where only some kinds were left out: `mamba`,
  `attention`, `mlp`, `moe`
- with `.stderr` after the name of a Shapley value: its standard error; with `.ci95`: the half-width of its 95%
  confidence interval
- `depth.scan_{loss,task}.{n}`, `depth.scan_{loss,task}.blocks.{n}`: what is lost without the n sub-layers, or blocks,
  that begin at each position
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.checkpoint.atomic import atomic_write
from megatron_ext.checkpoint.file_checksums import check_file
from megatron_ext.errors import ConfigError, PlanError, nearest
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION, LINEAR, MAMBA, MLP, MOE
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Scan, Shapley

FORMAT = "megatron_ext.scores/1"
HIDDEN = "hidden"
BLOCKS = ".blocks"
OF_KIND = {MAMBA: ".mamba", ATTENTION: ".attention", MLP: ".mlp", MOE: ".moe", LINEAR: ".linear"}
STDERR = ".stderr"
INTERVAL = ".ci95"


def ffn(layer: int) -> str:
    """The name of an MLP's scores."""
    return f"layers.{layer}.ffn"


def query_head(layer: int) -> str:
    """The name of an attention layer's scores."""
    return f"layers.{layer}.query_head"


def mamba(layer: int) -> str:
    """The name of a Mamba-2 layer's scores."""
    return f"layers.{layer}.mamba"


def state(layer: int) -> str:
    """The name of the scores of a Mamba-2 layer's states."""
    return f"layers.{layer}.state"


def expert(layer: int) -> str:
    """The name of the scores of a mixture's experts."""
    return f"layers.{layer}.expert"


def expert_ffn(layer: int) -> str:
    """The name of the scores of the neurons of a mixture's experts."""
    return f"layers.{layer}.expert_ffn"


def shared_ffn(layer: int) -> str:
    """The name of the scores of a shared expert's neurons."""
    return f"layers.{layer}.shared_ffn"


def depth(metric: str, *, blocks: bool = False, kind: str = "") -> str:
    """The name of the depth scores of sub-layers, of blocks, or of the sub-layers of one kind."""
    return f"depth.{metric}{BLOCKS if blocks else OF_KIND.get(kind, '')}"


def scan(metric: str, length: int, *, blocks: bool = False) -> str:
    """The name of the scores of a scan that leaves out every run of `length` sub-layers, or blocks."""
    return f"{depth(metric, blocks=blocks)}.{length}"


def shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every score that a model can have, and its shape."""
    layers: dict[str, tuple[int, ...]] = {}
    for i, unit in enumerate(arch.pattern):
        own = arch.at(i)
        if unit == MLP:
            layers[ffn(i)] = (own.ffn_hidden_size,)
        elif unit == ATTENTION:
            layers[query_head(i)] = (own.num_attention_heads,)
        elif unit == MAMBA:
            layers[mamba(i)] = (own.mamba_num_heads, own.mamba_head_dim)
            layers[state(i)] = (own.mamba_num_groups, own.mamba_state_dim)
        elif unit == MOE:
            layers[expert(i)] = (own.num_experts,)
            layers[expert_ffn(i)] = (own.num_experts, own.moe_ffn_hidden_size)
            if own.moe_shared_expert_intermediate_size:
                layers[shared_ffn(i)] = (own.moe_shared_expert_intermediate_size,)
    scans = [name for name, metric in DEPTH_METRICS.items() if isinstance(metric, Scan)]
    for metric in (name for name in DEPTH_METRICS if name not in scans):
        counts = {depth(metric): len(arch.pattern), depth(metric, blocks=True): len(arch.layers.blocks)}
        counts |= {depth(metric, kind=kind): arch.pattern.count(kind) for kind in set(arch.pattern)}
        for name, count in counts.items():
            details = (STDERR, INTERVAL) if isinstance(DEPTH_METRICS[metric], Shapley) else ()
            layers |= {name + detail: (count,) for detail in ("", *details)}
    for blocks, count in ((False, len(arch.pattern)), (True, len(arch.layers.blocks))):
        for metric in scans:
            layers |= {scan(metric, n, blocks=blocks): (count - n + 1,) for n in range(1, count)}
    return {HIDDEN: (arch.hidden_size,), **layers}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one model, and where they come from. Another family's have names of their own: `shapes`, `model_of`.

    Attributes:
        values: Name to tensor, as listed at the top of this file. A subset will do if a plan needs no more.
        architecture: The model that was scored, an `Architecture` unless they are another family's.
        model: Its checkpoint directory.
        iteration: Its training step.
        fingerprint: Its checkpoint's fingerprint (`megatron_ext.checkpoint.layout`).
        data: The calibration data.
        seed: The seed that chose the samples.
        samples: How many sequences were seen.
        metric: How activations became numbers, such as `"l2 over the batch, mean over the sequence"`.
        loss: The model's mean loss on the samples, nats per token, if it was run on any.
        task: The model's score at the task of a `scan_task`, if there is one.
        settings: All that the scores depend on beside the weights, by the names of the pruning job's options; empty if
            that is not known.

    Raises:
        PlanError: A name or a shape does not belong to this architecture, or a value is not finite.
    """

    values: dict[str, Tensor]
    architecture: Any
    model: str = ""
    iteration: int = 0
    fingerprint: str = ""
    data: str = ""
    seed: int = 0
    samples: int = 0
    metric: str = ""
    loss: float | None = None
    task: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        legal = self.shapes(self.architecture)
        for name, value in self.values.items():
            if name not in legal:
                raise PlanError(f"unknown score {name!r}", legal=nearest(name, legal))
            if tuple(value.shape) != legal[name]:
                raise PlanError(
                    f"the score {name!r} has the wrong shape", got=tuple(value.shape), legal=legal[name]
                )  # fmt: skip
            if not torch.isfinite(value).all():
                raise PlanError(f"the score {name!r} has values that are not finite")

    @staticmethod
    def shapes(model: Any) -> dict[str, tuple[int, ...]]:
        """Every score that a model can have, and its shape."""
        return shapes(model)

    @staticmethod
    def model_of(values: Mapping[str, Any]) -> Any:
        """A model, from its `to_dict`."""
        return Architecture.from_dict(dict(values))

    def __getitem__(self, name: str) -> Tensor:
        """One score, in float64.

        Raises:
            PlanError: It was not measured.
        """
        if name not in self.values:
            raise PlanError(
                f"the scores lack {name!r}", legal=f"run the scoring pass for it; there are: {', '.join(self.values)}"
            )
        return self.values[name].double()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, all or nothing; the metadata is in its header, each entry as JSON."""
        metadata = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "values"}
        metadata["architecture"] = self.architecture.to_dict()
        header = {"format": FORMAT} | {name: json.dumps(value) for name, value in metadata.items()}
        with atomic_write(path) as temporary:
            save_file({name: value.contiguous() for name, value in self.values.items()}, temporary, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            PlanError: The file is missing, damaged, or not a score file.
            CheckpointError: It lies in the directory that it was written into, and is not what was written.
        """
        check_file(path)
        if not Path(path).is_file():
            raise PlanError("the score file does not exist", got=path)
        try:
            with safe_open(path, framework="pt") as file:
                header = dict(file.metadata() or {})
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header.pop("format", None) != FORMAT:
                raise PlanError("this is not a score file", got=path, legal=f"safetensors with format {FORMAT}")
            metadata = {name: json.loads(value) for name, value in header.items()}
            architecture = cls.model_of(metadata.pop("architecture"))
            return cls(values=values, architecture=architecture, **metadata)
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, ConfigError) as error:
            raise PlanError(f"the score file is damaged: {error}", got=path) from error
