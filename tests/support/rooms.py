"""The tests of one room: `make test ONLY=pruning` runs the paths that `python tests/support/rooms.py pruning` prints.

A room's unit tests are those of its folder, `tests/unit/pruning`. What runs programs or several ranks is in the table.
"""

import sys
from pathlib import Path

from megatron_ext.errors import ConfigError, nearest

TESTS = Path(__file__).parents[1]
ROOMS: dict[str, tuple[str, ...]] = {
    # The rooms of the package
    "checkpoint": ("distributed/test_gpt.py", "functional/test_before_the_move.py"),
    "cli": (
        "unit/test_cli.py", "unit/test_flag_list.py", "unit/test_program.py", "unit/test_torchrun.py",
        "functional/test_added_jobs.py", "functional/test_package.py", "functional/test_stop.py",
    ),
    "compression": ("functional/test_compress.py", "unit/test_workflow.py"),
    "conversion": (
        "distributed/test_code_of_others.py", "distributed/test_convert.py", "distributed/test_g*.py",
        "distributed/test_pruned_families.py", "distributed/test_real_model.py", "distributed/test_verify.py",
        "functional/test_convert_jobs.py",
    ),
    "data": (),
    "demo": ("unit/test_workflow.py",),
    "distillation": (
        "distributed/test_elsewhere.py", "distributed/test_states.py", "functional/test_added_metrics.py",
        "functional/test_distill*.py",
    ),
    "estimate": ("functional/test_estimate.py", "unit/models/test_*cost.py"),
    "evaluation": ("functional/test_evaluate.py", "functional/test_measures.py"),
    "families": ("functional/test_measured_layer.py", "functional/test_toy_wing.py"),
    "inference": ("distributed/test_inference.py", "functional/test_generate.py"),
    "lm_head": ("distributed/test_distillation.py",),
    "models": ("functional/test_experts.py", "functional/test_layer_fields.py", "functional/test_linear_sublayer.py"),
    "ops": ("distributed/test_mamba_training.py", "functional/test_measured_layer.py"),
    "options": ("functional/test_flags.py",),
    "platform": ("distributed/test_m*.py", "functional/test_overlap.py"),
    "pretraining": ("functional/test_long_context.py", "functional/test_pretrain.py"),
    "pruning": (
        "distributed/test_apply.py", "distributed/test_expert_importance.py", "distributed/test_importance.py",
        "distributed/test_recovery.py", "functional/test_added_metrics.py", "functional/test_experts.py",
        "functional/test_prune*.py",
    ),
    "reports": (),
    "training": (
        "functional/test_extra_models.py", "functional/test_half_precision.py", "functional/test_reliability.py",
        "functional/test_restart.py", "functional/test_stop.py", "functional/test_toy_wing.py",
    ),
    "untrusted": ("unit/test_untrusted.py",),
    "verify": ("unit/checkpoint/test_checksums.py", "functional/test_reliability.py"),
    "vision": ("functional/test_vision*.py",),
    # What lies beside it
    "benchmarks": ("unit/test_*_page.py", "functional/test_benchmarks.py"),
    "docs": ("unit/test_pages.py", "functional/test_docs.py", "functional/test_documented_commands.py"),
    "examples": ("functional/test_examples.py", "functional/test_recipes.py"),
    "gpu": ("functional/test_gpu.py",),
    "tests": ("unit/test_fork_server.py", "unit/test_names.py", "unit/test_rooms.py"),
}  # fmt: skip


def paths_of(room: str) -> list[Path]:
    """The files and folders of a room's tests.

    Raises:
        ConfigError: There is no such room.
    """
    if room not in ROOMS:
        raise ConfigError("no such room has tests", got=f"ONLY={room}", legal=nearest(room, ROOMS))
    found = [path for pattern in (f"unit/{room}", *ROOMS[room]) for path in sorted(TESTS.glob(pattern))]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    try:
        print(*(path.relative_to(TESTS.parent) for room in sys.argv[1:] for path in paths_of(room)))
    except ConfigError as error:
        sys.exit(f"error: {error}")
