"""What is wrong with the options of a pruning job, found before any work; each of them has an effect, or is refused."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.errors import ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import LINEAR
from megatron_ext.pruning import task_scoring
from megatron_ext.pruning.budget import Targets, resolve
from megatron_ext.pruning.depth import check_borders
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Change, Shapley
from megatron_ext.pruning.fitting import check_spans, spans
from megatron_ext.pruning.options import PruneOptions
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.scores import Scores
from megatron_ext.pruning.select import make_plan
from megatron_ext.pruning.weights import check_weights
from megatron_ext.training.job import RunConfig

# How scores are measured; a score file says so itself.
MEASURED_BY = (
    "width_metric", "batch_aggregation", "sequence_aggregation", "samples", "depth_samples", "task", "task_metric",
    "task_samples", "shapley_samples", "shapley_tolerance", "shapley_keep",
)  # fmt: skip
# What a plan leaves open: how the report counts caches, and what stands in place of what it drops.
BESIDE_A_PLAN = ("plan", "memory_batch", "memory_context", "recover")


@dataclass(frozen=True)
class Request:
    """A pruning job that can begin.

    Attributes:
        target: What the model will become; which of its layers stay is not known before it is scored.
        task: What it is scored by, for `scan_task`.
    """

    target: Architecture
    task: task_scoring.Judged | None = None


def check(run: RunConfig) -> Request:
    """Find what is wrong with the options before any work is done.

    Raises:
        ConfigError, PlanError, CheckpointError, DataError: Says what.
    """
    args, options = run.args, run.options["prune"]
    for name in ("load", "save"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name} is missing", legal="--load MODEL --save NEW_DIRECTORY")
    source = source_step(args).path
    if options.plan is not None:
        fits = ("samples", "cache_gib", *(n for n in options.given() if n.startswith("recover_")))
        beside = (*BESIDE_A_PLAN, *fits) if options.recover is not None else BESIDE_A_PLAN
        _refuse(options, "the plan says what is kept", [n for n in options.given() if n not in beside])
        plan = Plan.load(options.plan)
        plan.check(run.architecture)
        _check_recovery(run, options, plan)
        check_weights("a plan", plan.provenance.fingerprint, plan.provenance.iteration, source)
        return Request(plan.target)
    targets = options.targets()
    targets.check(run.architecture)
    _check_effects(options, run.architecture)
    if options.scores is not None:
        scores = read_scores(options, source)
        plan = make_plan(scores, run.architecture, targets, merge_heads=options.merge_heads)
        _check_recovery(run, options, plan)
        return Request(plan.target)
    target = resolve(run.architecture, targets, _some_layers(run.architecture, targets))
    _check_rounds(run, options)
    _check_recovery(run, options)
    if not options.calibrates:
        return Request(target)
    check_borders(run.pattern)
    _check_samples(options, args.global_batch_size)
    if (options.depth_metric == "scan_task") != (options.task is not None):
        raise ConfigError("--prune-depth-metric scan_task goes with --prune-task", got=options.task)
    task = None
    if options.task is not None and not (run.dry_run and options.task.startswith(task_scoring.HARNESS)):
        # A dry run downloads nothing.
        limit, folders = options.task_samples, options.task_folder or ()
        task = task_scoring.find(run, options.task, options.task_metric, limit, folders)
    return Request(target, task)


def _check_recovery(run: RunConfig, options: PruneOptions, plan: Plan | None = None) -> None:
    """Check what is asked of `--prune-recover`, of which a plan says what it stands for."""
    given = [name for name in options.given() if name.startswith("recover_")]
    if options.recover is None:
        _refuse(options, "it goes with --prune-recover", given)
        return
    low_rank = options.recover == "low-rank"
    if not low_rank:
        _refuse(options, "a bias has none", [n for n in given if n in ("recover_rank", "recover_ridge")])
        _refuse(options, "it stands in its own place", [n for n in given if n == "recover_joint"])
    elif options.recover_into == "biases":
        raise ConfigError("a linear map does not go into a bias", legal="--prune-recover-into units")
    hidden, length = run.architecture.hidden_size, run.args.seq_length
    batch, samples = run.args.global_batch_size, options.recover_samples or options.samples
    for fine, name, legal in (
        (1 <= options.fitting.rank <= hidden or not low_rank, "recover_rank", f"1 to the hidden size, {hidden}"),
        (options.recover_ridge >= 0, "recover_ridge", "from 0"),
        (0 <= options.recover_skip < length, "recover_skip", f"0 up to --seq-length {length}"),
        (samples >= batch and samples % batch == 0, "recover_samples", f"multiples of --global-batch-size {batch}"),
    ):
        if not fine:
            value = getattr(options, name)
            raise ConfigError(_flag(name), got=samples if value is None else value, legal=legal)
    if LINEAR in run.architecture.pattern and options.fitting.rank > run.architecture.linear_rank:
        raise ConfigError(
            "--prune-recover-rank: linear sub-layers have one rank", got=options.recover_rank,
            legal=f"up to {run.architecture.linear_rank}, that of those which the model has",
        )  # fmt: skip
    dropped = options.cuts_depth if plan is None else len(plan.units) < len(plan.source.pattern)
    if not dropped:
        _refuse(options, "no layers are to go", ["recover"])
    if plan is not None:
        if plan.recovery is not None:
            _refuse(options, "the plan has its own recovery", ["recover"])
        gone = set(range(len(plan.source.pattern))) - set(plan.units)
        check_spans(spans(gone, options.recover_joint), run.pattern)


def source_step(args: Namespace) -> layout.Step:
    """The step that is cut: the one that Megatron loads, which `--ckpt-step` may say."""
    return layout.find(Path(args.load) / (f"iter_{args.ckpt_step:07d}" if args.ckpt_step else ""))


def read_scores(options: Any, source: Path, kind: type[Scores] = Scores) -> Scores:
    """The score file of `--prune-scores`.

    Args:
        options: The flags.
        source: The step that is cut.
        kind: Of the scores.

    Raises:
        PlanError: It cannot be read, or was made from other weights than those of the step `source`.
        ConfigError: It was measured in another way than the options say.
    """
    assert options.scores is not None
    scores = kind.load(options.scores)
    check_weights("scores", scores.fingerprint, scores.iteration, source)
    for name, value in options.given().items():
        if name in MEASURED_BY and scores.settings.get(name) != value:
            raise ConfigError(
                f"--prune-scores: the scores were measured with another {_flag(name)}", got=value,
                legal=f"{scores.settings.get(name, 'unknown')}, or new scores: without --prune-scores",
            )  # fmt: skip
    return scores


def check_layout(run: RunConfig, arch: Architecture) -> None:
    """Check that a model fits the layout of a run.

    Raises:
        ConfigError: It does not.
    """
    args = run.args
    stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    arch.validate(
        tp=args.tensor_model_parallel_size, pp=stages, ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size,
    )  # fmt: skip
    check_borders(arch.layers.split(stages))


def _check_effects(options: PruneOptions, arch: Architecture) -> None:
    """Refuse each option that would change nothing."""
    budget = options.target_params is not None or options.target_memory is not None
    given = options.given()
    searched = isinstance(DEPTH_METRICS[options.depth_metric], Shapley)

    def needs(fine: bool, reason: str, *names: str) -> None:
        if not fine:
            _refuse(options, reason, [name for name in names if name in given])

    needs(options.target_params is not None, "it goes with --prune-target-params", "target_non_embedding")
    needs(budget, "it goes with a budget", "hidden_divisor")
    needs(options.hidden_size is None, "--prune-hidden-size is given", "hidden_divisor")
    spread = options.per_layer or []
    found = [n for n in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size") if getattr(arch, n, 0)]
    ffn = budget and any(getattr(options, n) is None for n in ("ffn_hidden_size", *found))
    needs("ffn" in spread or ffn, "it goes with a budget that finds FFN sizes, or --prune-per-layer ffn", "ffn_divisor")
    heads = budget and options.mamba_num_heads is None and options.mamba_num_groups is None
    needs(
        "mamba" in spread or heads, "it goes with a budget that finds Mamba-2 heads, or --prune-per-layer mamba",
        "mamba_heads_divisor",
    )  # fmt: skip
    for name, sizes in (("ffn", ("ffn_hidden_size",)), ("mamba", ("mamba_num_heads", "mamba_num_groups"))):
        if name in spread and not budget and all(getattr(options, size) is None for size in sizes):
            raise ConfigError(
                f"--prune-per-layer {name} without effect: no size to share out",
                legal=f"with {_flag(sizes[0])} or a budget",
            )  # fmt: skip
    needs(options.num_attention_heads is not None, "no query heads are dropped", "merge_heads")
    by_depth = ("depth_metric", "task", "depth_samples", *(() if options.recover else ("cache_gib",)))
    needs(options.cuts_depth, "no layers are to go", *by_depth)
    targets = options.targets()
    chooses = bool(targets.chosen_kinds(arch)) or not targets.kinds(arch)
    needs(chooses, "of each kind all layers stay or none does, so nothing is chosen", *by_depth)
    # Of scores that are there, a depth metric chooses; the others say how scores are measured.
    needs(options.scores is None, "the scores are there", "iterations", "task_folder")
    needs(options.scores is None or options.recover is not None, "the scores are there", "cache_gib")
    needs(searched, "it goes with --prune-depth-metric shapley_...", *(n for n in given if n.startswith("shapley_")))
    task = options.depth_metric == "scan_task"
    needs(task, "it goes with --prune-depth-metric scan_task", "task_metric", "task_samples", "task_folder")
    left_out = not isinstance(DEPTH_METRICS[options.depth_metric], Change) and not task
    needs(left_out, f"{options.depth_metric} leaves no layers out of calibration", "depth_samples")
    needs(left_out or options.recover is not None, f"{options.depth_metric} keeps no activations", "cache_gib")
    activations = options.width_metric == "activation"
    needs(activations, f"{options.width_metric} has its own", "batch_aggregation", "sequence_aggregation")
    needs(options.calibrates, "weights alone are scored", "samples")


def _refuse(options: PruneOptions, reason: str, names: list[str]) -> None:
    if names:
        value = getattr(options, names[0])
        shown = " ".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)
        raise ConfigError(f"{_flag(names[0])} would have no effect: {reason}", got=f"{_flag(names[0])} {shown}".strip())


def _flag(name: str) -> str:
    return f"--prune-{name.replace('_', '-')}"


def _check_samples(options: PruneOptions, batch: int) -> None:
    """Sequences are taken in whole global batches; layers are left out on some of them, or all."""
    most = options.samples
    for name, count in (("samples", most), ("depth_samples", options.depth_sequences(batch))):
        if count < 1 or count % batch:
            raise ConfigError(
                f"{_flag(name)} must be a multiple of --global-batch-size", got=count, legal=f"multiples of {batch}"
            )
        if count > most:
            raise ConfigError(f"{_flag(name)} are some of --prune-samples", got=count, legal=f"{most} at most")
    if options.cache_gib < 0:
        raise ConfigError("--prune-cache-gib", got=options.cache_gib, legal="from 0")
    if isinstance(DEPTH_METRICS[options.depth_metric], Shapley):
        samples, tolerance, keep = options.shapley_samples, options.shapley_tolerance, options.shapley_keep
        if samples < 2 or tolerance < 0 or not 0 <= keep < 1:
            raise ConfigError(
                "Shapley options", got=f"{samples} samples, tolerance {tolerance}, keep {keep}",
                legal="at least 2 samples, tolerance from 0, keep from 0 up to 1",
            )  # fmt: skip


def _check_rounds(run: RunConfig, options: PruneOptions) -> None:
    if options.iterations < 1:
        raise ConfigError("--prune-iterations must be positive", got=options.iterations)
    if options.iterations > 1 and options.merge_heads:
        raise ConfigError("query heads are merged once: --prune-merge-heads goes with --prune-iterations 1")
    for targets in options.rounds(run.architecture)[:-1]:
        small = resolve(run.architecture, targets, _some_layers(run.architecture, targets))
        try:
            check_layout(run, small)
        except ConfigError as error:
            raise ConfigError(f"a model between two rounds does not fit this layout: {error}") from error


def _some_layers(arch: Architecture, targets: Targets) -> str:
    """A pattern with as many layers as are asked for; which ones stay is not known before they are scored."""
    if targets.num_layers is not None:
        return "".join(arch.pattern[i] for block in arch.layers.blocks[: targets.num_layers] for i in block)
    left = targets.kinds(arch)
    pattern = ""
    for unit in arch.pattern[: targets.num_sublayers]:
        left[unit] = left.get(unit, len(arch.pattern)) - 1
        pattern += unit if left[unit] >= 0 else ""
    return pattern
