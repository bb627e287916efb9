"""Every option of a pruning job has an effect, or is refused."""

from argparse import Namespace
from dataclasses import fields, replace
from typing import Any

import pytest
from random_models import random_scores

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.writer import writing
from megatron_ext.errors import ConfigError, PlanError
from megatron_ext.models import axes
from megatron_ext.models.pattern import parse
from megatron_ext.models.presets import PRESETS
from megatron_ext.pruning.budget import Targets
from megatron_ext.pruning.checks import BESIDE_A_PLAN, MEASURED_BY, check
from megatron_ext.pruning.fitting import check_spans, spans
from megatron_ext.pruning.job import JOB
from megatron_ext.pruning.options import PruneOptions
from megatron_ext.pruning.plan import Plan
from megatron_ext.training.job import RunConfig

ARCH = replace(PRESETS["tiny-hybrid"].architecture, hidden_size=64, padded_vocab_size=64)
# A value of each option that is not its default.
OTHERS: dict[str, Any] = {
    "per_layer": ["ffn"],
    "width_metric": "wanda",
    "depth_metric": "loss",
    "batch_aggregation": "mean",
    "sequence_aggregation": "l2",
    "task": "a:b",
    "task_metric": "acc_norm",
    "task_folder": ["tasks"],
    "attention_layers": 0.5,
    "mamba_layers": 0.5,
    "mlp_layers": 0.5,
    "moe_layers": 0.5,
    "target_params": 0.5,
    "target_memory": 1.0,
    "shapley_tolerance": 0.2,
    "shapley_keep": 0.5,
    "cache_gib": 1.0,
    "recover": "low-rank",
    "recover_stream": "pruned",
    "recover_into": "units",
    "recover_ridge": 0.5,
}
DEPTH = {"num_layers": 4}
BUDGET = {"target_params": 0.5}


def value_of(name: str) -> Any:
    (field,) = [field for field in fields(PruneOptions) if field.name == name]
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(field.default, bool):
        return not field.default
    return 8 if "scores" not in name and "plan" not in name else f"{name}.file"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint, with scores and a plan of it."""
    import torch

    path = tmp_path_factory.mktemp("check")
    with writing(path / "model", ARCH) as writer:
        for key, shape in axes.tensors(ARCH).items():
            writer.write(key, torch.zeros(shape))
    fingerprint = layout.fingerprint(path / "model" / "release")
    settings = {"width_metric": "wanda", "samples": 8, "task": "a:b", "task_metric": "acc"}
    replace(random_scores(ARCH), fingerprint=fingerprint, settings=settings).save(path / "scores")
    Plan.keep_everything(ARCH).save(path / "plan")
    return path


def checked(model, **options: Any):
    args = Namespace(
        load=model / "model",
        save="new",
        ckpt_step=None,
        global_batch_size=4,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        hybrid_layer_pattern=ARCH.pattern,
        seq_length=16,
    )
    given = PruneOptions(**{"samples": 8, **options})
    return check(RunConfig(JOB, args, ARCH, False, {"prune": given}, "a test"))


@pytest.mark.parametrize("name", [f.name for f in fields(PruneOptions) if f.name not in BESIDE_A_PLAN])
def test_nothing_goes_with_a_plan(model, name: str) -> None:
    with pytest.raises(ConfigError, match=f"--prune-{name.replace('_', '-')} would have no effect: the plan says"):
        checked(model, **{"plan": str(model / "plan"), "samples": 1024, name: value_of(name)})


def test_a_plan_alone_is_right(model) -> None:
    assert checked(model, plan=str(model / "plan"), samples=1024, memory_batch=4).target == ARCH


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"hidden_size": 32, "target_non_embedding": True}, "target-non-embedding"),
        ({"hidden_size": 32, "hidden_divisor": 16}, "hidden-divisor"),
        ({**BUDGET, "hidden_size": 48, "hidden_divisor": 16}, "hidden-divisor"),
        ({"ffn_hidden_size": 256, "ffn_divisor": 16}, "ffn-divisor"),
        ({**BUDGET, "ffn_hidden_size": 256, "ffn_divisor": 16}, "ffn-divisor"),
        ({**BUDGET, "mamba_num_heads": 8, "mamba_heads_divisor": 2}, "mamba-heads-divisor"),
        ({"hidden_size": 32, "per_layer": ["ffn"]}, "per-layer ffn"),
        ({"ffn_hidden_size": 256, "per_layer": ["ffn", "mamba"]}, "per-layer mamba"),
        ({"hidden_size": 32, "merge_heads": True}, "merge-heads"),
        ({"num_query_groups": 1, "merge_heads": True}, "merge"),
        ({"hidden_size": 32, "depth_metric": "loss"}, "depth-metric"),
        ({"hidden_size": 32, "depth_metric": "relative_l1"}, "depth-metric"),
        ({"attention_layers": 0, "depth_metric": "loss"}, "depth-metric loss"),
        ({"attention_layers": 0, "cache_gib": 1.0}, "cache-gib"),
        ({**DEPTH, "depth_samples": 4}, "depth-samples"),
        ({**DEPTH, "cache_gib": 1.0}, "cache-gib"),
        ({**DEPTH, "depth_metric": "loss", "shapley_keep": 0.5}, "shapley-keep"),
        ({**DEPTH, "shapley_samples": 4}, "shapley-samples"),
        ({**DEPTH, "task_metric": "acc_norm"}, "task-metric"),
        ({**DEPTH, "depth_metric": "loss", "task_samples": 4}, "task-samples"),
        ({**DEPTH, "depth_metric": "loss", "task": "a:b"}, "goes with --prune-task"),
        ({"hidden_size": 32, "width_metric": "wanda", "batch_aggregation": "mean"}, "batch-aggregation"),
        ({**DEPTH, "width_metric": "magnitude", "sequence_aggregation": "l2"}, "sequence-aggregation"),
        ({"hidden_size": 32, "width_metric": "magnitude"}, "--prune-samples would have no effect"),
        ({**DEPTH, "recover_rank": 4}, "recover-rank 4"),
        ({**DEPTH, "recover": "bias", "recover_ridge": 0.5}, "recover-ridge"),
        ({**DEPTH, "recover": "bias", "recover_joint": True}, "recover-joint"),
        ({**DEPTH, "recover": "low-rank", "recover_into": "biases"}, "does not go into a bias"),
        ({"hidden_size": 32, "recover": "bias"}, "--prune-recover bias"),
    ],
)
def test_what_would_have_no_effect_is_refused(model, options: dict[str, Any], refused: str) -> None:
    with pytest.raises(ConfigError, match=refused):
        checked(model, **options)


@pytest.mark.parametrize(
    "options",
    [
        {**BUDGET, "target_non_embedding": True, "hidden_divisor": 8, "ffn_divisor": 8, "mamba_heads_divisor": 2},
        {"ffn_hidden_size": 256, "per_layer": ["ffn"], "ffn_divisor": 16},
        {"num_attention_heads": 4, "merge_heads": True},
        {**BUDGET, "per_layer": ["ffn", "mamba"]},
        {**DEPTH, "depth_metric": "loss", "depth_samples": 4, "cache_gib": 0.0},
        {**DEPTH, "depth_metric": "shapley_loss", "shapley_keep": 0.5, "shapley_samples": 4, "shapley_tolerance": 0.2},
        {"hidden_size": 32, "width_metric": "wanda"},
        {**DEPTH, "recover": "bias", "recover_skip": 4, "recover_into": "units", "cache_gib": 1.0},
        {"attention_layers": 0, "recover": "low-rank", "recover_rank": 64, "recover_joint": True},
        {**DEPTH, "width_metric": "magnitude"},
        {"hidden_size": 32, "width_metric": "magnitude", "samples": 1024},
        {
            **DEPTH,
            "depth_metric": "scan_task",
            "task": "megatron_ext.evaluation.synthetic:copying_choice",
            "task_metric": "acc_norm",
            "task_samples": 4,
        },
    ],
)
def test_what_has_an_effect_is_right(model, options: dict[str, Any]) -> None:
    checked(model, **options)


@pytest.mark.parametrize("name", [*MEASURED_BY, "iterations", "cache_gib", "task_folder"])
def test_scores_say_how_they_were_measured(model, name: str) -> None:
    options = {"num_layers": 4, "scores": str(model / "scores"), "samples": 1024, name: value_of(name)}
    if name.startswith("shapley"):
        options["depth_metric"] = "shapley_loss"
    elif name.startswith("task"):
        options["depth_metric"] = "scan_task"
    elif name in ("depth_samples", "cache_gib"):
        options["depth_metric"] = "loss"
    if name in ("task", "samples", "width_metric"):
        checked(model, **options)  # as they were measured
        options |= {"task": "a:c"} if name == "task" else {"samples": 4} if name == "samples" else {}
        if name == "width_metric":
            options["width_metric"] = "magnitude"
    with pytest.raises(ConfigError, match=f"--prune-{name.replace('_', '-')}"):
        checked(model, **options)


def test_scores_and_plans_of_other_weights_are_refused(model, tmp_path) -> None:
    replace(random_scores(ARCH), fingerprint="0" * 16).save(tmp_path / "scores")
    with pytest.raises(PlanError, match="scores of other weights"):
        checked(model, scores=str(tmp_path / "scores"), samples=1024, num_layers=4)
    plan = Plan.keep_everything(ARCH)
    replace(plan, provenance=replace(plan.provenance, fingerprint="0" * 16)).save(tmp_path / "plan")
    with pytest.raises(PlanError, match="a plan of other weights"):
        checked(model, plan=str(tmp_path / "plan"), samples=1024)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 6}, "--prune-samples must be a multiple"),
        ({"samples": 0}, "--prune-samples must be"),
        ({"depth_samples": 3}, "--prune-depth-samples must be a multiple"),
        ({"depth_samples": 0}, "must be a multiple"),
        ({"depth_samples": 12}, "--prune-depth-samples are some of"),
        ({"cache_gib": -1.0}, "--prune-cache-gib"),
        ({"depth_metric": "shapley_loss", "shapley_samples": 1}, "Shapley options"),
        ({"depth_metric": "scan_task"}, "goes with --prune-task"),
        ({"iterations": 0}, "--prune-iterations"),
        ({"recover": "low-rank", "recover_rank": 65}, "--prune-recover-rank"),
        ({"recover": "low-rank", "recover_rank": 0}, "--prune-recover-rank"),
        ({"recover": "low-rank", "recover_ridge": -1.0}, "--prune-recover-ridge"),
        ({"recover": "bias", "recover_skip": 16}, "--prune-recover-skip"),
        ({"recover": "bias", "recover_samples": 6}, "--prune-recover-samples"),
        ({"depth_metric": "scan_task", "task": "nowhere:at_all"}, "the task cannot be loaded"),
        (
            {"depth_metric": "scan_task", "task": "megatron_ext.evaluation.synthetic:copying", "task_metric": "ppl"},
            "acc",
        ),
        ({"depth_metric": "scan_task", "task": "a:b", "task_folder": ["x"]}, "has tasks of the harness"),
        ({"depth_metric": "scan_task", "task": "a:b", "task_samples": -1}, "--prune-task-samples"),
    ],
)
def test_values_out_of_range_are_refused_at_once(model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(model, **{**DEPTH, "depth_metric": "loss", **options})


def test_targets_are_the_options(model) -> None:
    """Every field of `Targets` is asked for by some option, under its own name or another."""
    sizes = {field.name: 8 for field in fields(Targets) if field.name in {f.name for f in fields(PruneOptions)}}
    sizes |= {"per_layer": ["ffn"], "depth_metric": "loss"}
    asked = PruneOptions(**sizes, target_params=0.5, target_non_embedding=True, memory_batch=3, memory_context=7)  # type: ignore[arg-type]
    targets = asked.targets()
    for field in fields(Targets):
        if field.name == "memory":
            continue
        assert getattr(targets, field.name) != field.default, field.name
    assert PruneOptions(target_memory=2.0).targets().memory == 2 * 2**30


def test_a_recovery_goes_with_a_plan_that_drops_something(model, tmp_path) -> None:
    """Of which one map may stand for a run, unless the pipeline cuts it; and a plan has one."""
    plan = Plan.keep_everything(ARCH)
    kept = tuple(i for i in plan.units if i not in (3, 4))
    target = replace(ARCH, pattern="".join(ARCH.pattern[i] for i in kept))
    plan = replace(plan, units=kept, target=target)
    plan.save(tmp_path / "plan")
    given = {"plan": str(tmp_path / "plan"), "samples": 1024, "recover": "low-rank"}
    assert checked(model, **given).target == target
    with pytest.raises(ConfigError, match="no layers are to go"):
        checked(model, **{**given, "plan": str(model / "plan")})
    with pytest.raises(ConfigError, match="border before sub-layer 4 cuts"):
        check_spans(spans((3, 4), joint=True), parse(f"{ARCH.pattern[:4]}|{ARCH.pattern[4:]}"))
    check_spans(spans((3, 4), joint=False), parse(f"{ARCH.pattern[:4]}|{ARCH.pattern[4:]}"))
