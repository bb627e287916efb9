"""The flags of the pruning job, `--prune-*`."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megatron_ext.models.architecture import Architecture
from megatron_ext.models.cost import Workload
from megatron_ext.options.fields import option
from megatron_ext.pruning.aggregations import AGGREGATIONS
from megatron_ext.pruning.budget import Targets
from megatron_ext.pruning.calibration import Calibration
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Shapley
from megatron_ext.pruning.fitting import Fitting
from megatron_ext.pruning.importance import WidthMetric
from megatron_ext.pruning.leave_out import ShapleySampling

GIB = 2**30
# Options of one name here and in `Targets`.
SAME_IN_TARGETS = (
    "hidden_size", "ffn_hidden_size", "num_query_groups", "num_attention_heads", "mamba_num_groups", "mamba_num_heads",
    "mamba_head_dim", "mamba_state_dim", "num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "num_layers", "num_sublayers", "attention_layers", "mamba_layers", "mlp_layers", "moe_layers", "depth_metric",
    "hidden_divisor", "ffn_divisor", "mamba_heads_divisor",
)  # fmt: skip
SPREAD = {"ffn": "ffn_hidden_size", "mamba": "mamba_num_heads"}
DEPTH_SAMPLES = 128


@dataclass(frozen=True)
class PruneOptions:
    """What the smaller model should be, and how importance is measured."""

    target_params: float | None = option(None, "Parameters to keep: up to 1.0 a fraction, above it a count.")
    target_non_embedding: bool = option(False, "--prune-target-params leaves out embedding and output layer.")
    target_memory: float | None = option(None, "GiB of 16-bit weights and caches to fit in.")
    memory_batch: int = option(1, "Sequences whose caches --prune-target-memory counts.")
    memory_context: int = option(8192, "Tokens of each of these sequences.")
    hidden_size: int | None = option(None, "Channels of the residual stream to keep.")
    ffn_hidden_size: int | None = option(None, "Neurons of each MLP to keep.")
    num_query_groups: int | None = option(None, "Key/value groups to keep; the query heads of the others go too.")
    num_attention_heads: int | None = option(None, "Query heads to keep; each group keeps the same number.")
    mamba_num_groups: int | None = option(None, "SSM groups to keep; the Mamba-2 heads of the others go too.")
    mamba_num_heads: int | None = option(None, "Mamba-2 heads to keep; each SSM group keeps the same number.")
    mamba_head_dim: int | None = option(None, "Channels of each Mamba-2 head to keep.")
    mamba_state_dim: int | None = option(None, "State channels of each SSM group to keep.")
    num_experts: int | None = option(None, "Experts of each mixture to keep; expert parallelism must divide them.")
    moe_ffn_hidden_size: int | None = option(None, "Neurons of each expert to keep.")
    moe_shared_expert_intermediate_size: int | None = option(None, "Neurons of the shared expert to keep.")
    per_layer: list[Literal["ffn", "mamba"]] | None = option(
        None, "FFN neurons, Mamba-2 heads: layers keep different numbers by importance; the size is their average."
    )
    hidden_divisor: int | None = option(
        None, "Hidden sizes found for a budget are multiples of it; 64 for models from 2048 up, else 8, if not given."
    )
    ffn_divisor: int | None = option(None, "The same for FFN sizes, also those of --prune-per-layer.")
    mamba_heads_divisor: int | None = option(
        None, "The same for Mamba-2 heads, which are multiples of the SSM groups in any case."
    )
    num_layers: int | None = option(None, "Layers to keep; a layer is a mixer with the MLPs after it.")
    num_sublayers: int | None = option(None, "Sub-layers to keep, of whatever kind.")
    attention_layers: float | None = option(None, "Attention sub-layers to keep: a number, or a fraction below 1.")
    mamba_layers: float | None = option(None, "Mamba-2 sub-layers to keep: a number, or a fraction below 1.")
    mlp_layers: float | None = option(None, "MLP sub-layers to keep: a number, or a fraction below 1.")
    moe_layers: float | None = option(None, "Mixtures of experts to keep: a number, or a fraction below 1.")
    width_metric: Literal["activation", "wanda", "magnitude"] = option(
        "activation", "Importance of widths: activations, weight times activation, or weights alone."
    )
    batch_aggregation: str = option("l2", "How activations are aggregated over the samples.", choices=AGGREGATIONS.keys)
    sequence_aggregation: str = option(
        "mean", "How activations are aggregated over a sample's tokens.", choices=AGGREGATIONS.keys
    )
    merge_heads: bool = option(False, "Fold what is lost with dropped query heads into those that stay.")
    depth_metric: str = option(
        "block_influence",
        "Importance of layers and sub-layers. The first three come for free; loss and logit metrics leave each out in "
        "turn, shapley averages over sub-networks, scan drops the one contiguous run that costs least.",
        choices=DEPTH_METRICS.keys,
    )
    depth_samples: int | None = option(
        None, "Calibration sequences for what leaves layers out; 128, or --prune-samples if that is less, if not given."
    )
    task: str | None = option(None, "What scan_task is scored by: package.module:function, or lm_eval:NAME.")
    task_metric: str = option("acc", "Which number of the task counts: acc, acc_norm, or one of the harness's.")
    task_samples: int | None = option(None, "Questions of the task at most.")
    task_folder: list[str] | None = option(None, "Where else tasks for lm_eval:NAME are described.")
    shapley_samples: int = option(16, "Samples at most: each is a permutation and its reverse, a draw for every unit.")
    shapley_tolerance: float = option(
        0.1, "Stop, after 8 samples or more, when 95% intervals reach no further than this share of the values' range."
    )
    shapley_keep: float = option(0.0, "Share of the layers that always stay in the sampled sub-networks.")
    cache_gib: float = option(8.0, "Activations that each rank may keep, so that no layer runs twice.")
    recover: Literal["bias", "low-rank"] | None = option(
        None, "What stands in place of dropped sub-layers, fitted on calibration data: their mean update, or a linear "
        "map of low rank and a bias."
    )  # fmt: skip
    recover_rank: int = option(16, "Rank of the maps.")
    recover_ridge: float = option(0.01, "Ridge of the regression, in units of the median variance of a channel.")
    recover_stream: Literal["clean", "pruned"] = option(
        "clean", "Fit them all at once in the whole model, or one after the other from the bottom up, each on what "
        "comes out of those before."
    )  # fmt: skip
    recover_joint: bool = option(False, "One map stands for all dropped sub-layers in a row.")
    recover_skip: int = option(0, "Tokens at the beginning of each sequence that are not counted: attention sinks.")
    recover_samples: int | None = option(None, "Calibration sequences; --prune-samples if it is not given.")
    recover_into: Literal["biases", "units"] | None = option(
        None, "Whether a bias goes into the output bias of the nearest sub-layer below, or is a sub-layer of its own; "
        "if it is not given, the first where every one has such a place."
    )  # fmt: skip
    iterations: int = option(1, "Cut in so many rounds, and measure anew before each.")
    samples: int = option(1024, "Calibration sequences.")
    scores: str | None = option(None, "Cut by this score file, made earlier, instead of calibrating.")
    plan: str | None = option(None, "Apply this plan, instead of making one.")

    def targets(self) -> Targets:
        """What is asked for."""
        return Targets(
            **{name: getattr(self, name) for name in SAME_IN_TARGETS},
            params=self.target_params,
            embedding=not self.target_non_embedding,
            memory=None if self.target_memory is None else self.target_memory * GIB,
            workload=self.served,
            per_layer=tuple(SPREAD[name] for name in self.per_layer or ()),
        )

    def given(self) -> dict[str, object]:
        """The options that are not at their defaults."""
        every = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {name: value for name, (value, default) in every.items() if value != default}

    @property
    def served(self) -> Workload:
        """What caches are counted for."""
        return Workload(self.memory_batch, self.memory_context)

    def rounds(self, arch: Architecture) -> list[Targets]:
        """What is asked for, in `--prune-iterations` equal steps."""
        last = self.targets()
        if self.iterations == 1:
            return [last]
        return [last.toward(arch, (number + 1) / self.iterations) for number in range(self.iterations)]

    @property
    def cuts_depth(self) -> bool:
        """Whether layers or sub-layers are to go."""
        kinds = (self.attention_layers, self.mamba_layers, self.mlp_layers, self.moe_layers)
        return any(asked is not None for asked in (self.num_layers, self.num_sublayers, *kinds))

    @property
    def fitting(self) -> Fitting:
        """How what stands for dropped sub-layers is fitted."""
        rank, ridge = (self.recover_rank, self.recover_ridge) if self.recover == "low-rank" else (0, 0.0)
        return Fitting(rank, ridge, self.recover_stream, self.recover_skip, round(self.cache_gib * GIB))

    @property
    def calibrates(self) -> bool:
        """Whether the model must see data to be scored."""
        return self.width_metric != "magnitude" or self.cuts_depth

    def depth_sequences(self, global_batch_size: int) -> int:
        """Calibration sequences for what leaves layers out."""
        if self.depth_samples is not None:
            return self.depth_samples
        return min(self.samples, -(-DEPTH_SAMPLES // global_batch_size) * global_batch_size)

    def calibration(self, arch: Architecture, targets: Targets, seed: int, global_batch_size: int) -> Calibration:
        """What the calibration pass measures of a model for these targets."""
        blocks = targets.num_layers is not None
        run = 0
        if targets.num_layers is not None:
            run = len(arch.layers.blocks) - targets.num_layers
        elif targets.num_sublayers is not None:
            run = len(arch.pattern) - targets.num_sublayers
        kinds = targets.chosen_kinds(arch)
        chooses = bool(kinds) if targets.kinds(arch) else self.cuts_depth
        kind = "wanda" if self.width_metric == "wanda" else "activation"
        width = WidthMetric(kind, self.batch_aggregation, self.sequence_aggregation)
        return Calibration(
            samples=self.samples,
            width=None if self.width_metric == "magnitude" else width,
            depth=self.depth_metric if chooses else "block_influence",
            blocks=blocks,
            kinds=kinds,
            run=run,
            sampling=ShapleySampling(self.shapley_samples, self.shapley_tolerance, self.shapley_keep, seed),
            depth_samples=self.depth_sequences(global_batch_size),
            memory=round(self.cache_gib * GIB),
        )

    def metric(self) -> str:
        """How importance is measured, in words."""
        width = str(WidthMetric("activation", self.batch_aggregation, self.sequence_aggregation))
        if self.width_metric != "activation":
            width = {"wanda": str(WidthMetric("wanda")), "magnitude": "l2 norms of weights"}[self.width_metric]
        depth = self.depth_metric
        if depth == "scan_task":
            depth += f" of {self.task}, {self.task_metric}"
        elif isinstance(DEPTH_METRICS[depth], Shapley):
            depth += f", {self.shapley_keep:g} of the layers always there"
        return f"{width}; depth by {depth}"
