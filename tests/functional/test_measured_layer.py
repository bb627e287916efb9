"""The layer that kernels are chosen by is the one that a rank runs, on every layout."""

import json
from pathlib import Path

import fork_server
import pytest
from workspace import MODEL, ROOT, TRAIN, Workspace

from megatron_ext.families.language_model import LANGUAGE_MODEL
from megatron_ext.options.early_flags import read_early

# Notes the first layer that is run: heads, groups, tokens, batch, and whether the norm is an operation by itself.
NOTED = """
import json, os, runpy, sys
from megatron_ext.ops import mamba_ssm_api as api
combined, seen = api.mamba_split_conv1d_scan_combined, []
def noted(zxbcdt, *rest, **options):
    heads, batch, tokens = len(rest[3]), *zxbcdt.shape[:2]
    seen.append([heads, options["ngroups"], tokens, batch, options.get("rmsnorm_weight") is None])
    return combined(zxbcdt, *rest, **options)
api.mamba_split_conv1d_scan_combined = noted
if "mamba_ssm.ops.triton.ssd_combined" in sys.modules:  # as Megatron has it, imported before
    import megatron.core.ssm.mamba_mixer as mixer
    sys.modules["mamba_ssm.ops.triton.ssd_combined"].mamba_split_conv1d_scan_combined = noted
    mixer.mamba_split_conv1d_scan_combined = noted
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open("layer " + os.environ.get("RANK", "0"), "w") as file:
        json.dump(seen[0], file)
"""
# Heads that follow from the hidden size, as Megatron has them: 2 x 64 / 16.
DERIVED = [word for i, word in enumerate(MODEL) if "--mamba-num-heads" not in MODEL[max(0, i - 1) : i + 1]]


@pytest.mark.parametrize(
    ("model", "flags", "ranks"),
    [
        (MODEL, [], 1),
        (DERIVED, ["--micro-batch-size", "4"], 1),
        (MODEL, ["--tensor-model-parallel-size", "2", "--sequence-parallel"], 2),
        (MODEL, ["--context-parallel-size", "2", "--micro-batch-size", "1"], 2),
        (MODEL, ["--context-parallel-size", "4"], 4),
    ],
    ids=["one process", "derived heads, micro-batch 4", "tensor 2", "context 2", "context 4, two ranks to a group"],
)
def test_the_layer_that_is_measured_is_the_one_that_runs(
    workspace: Workspace, tmp_path: Path, model: list[str], flags: list[str], ranks: int
) -> None:
    script = workspace.path / "noted.py"
    script.write_text(NOTED)
    words = [*model, *workspace.data, *TRAIN, "--train-iters", "1", *flags]
    done = fork_server.run(
        [script, ROOT / "pretrain_hybrid.py", *words, "--save", tmp_path / "run"], ranks, workspace.path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shape = LANGUAGE_MODEL.ssm_shape(read_early(words, {}, LANGUAGE_MODEL.early_arguments()))
    assert shape is not None
    measured = [shape.heads, shape.groups, shape.tokens, shape.batch, shape.norm_apart]
    for rank in range(ranks):
        assert json.loads((workspace.path / f"layer {rank}").read_text()) == measured
