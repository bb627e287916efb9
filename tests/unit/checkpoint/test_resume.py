import os
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.resume import (
    architecture_on_disk,
    check_experts,
    check_sharding,
    has_checkpoint,
    own_resume_point,
    resume_point,
)
from megatron_ext.checkpoint.writer import writing
from megatron_ext.errors import CheckpointError
from megatron_ext.models import axes
from megatron_ext.models.presets import PRESETS

ARCH = replace(PRESETS["tiny-hybrid"].architecture, pattern="M-", hidden_size=16, padded_vocab_size=32)

EXPERTS = replace(ARCH, pattern="E", num_experts=4, moe_ffn_hidden_size=8)


def write(directory, step):
    with writing(directory / "made", ARCH, Namespace(seed=1)) as writer:
        for key, shape in axes.tensors(ARCH).items():
            writer.write(key, torch.zeros(shape))
    (directory / "made" / "release").rename(directory / step)
    for path in (directory / "made").iterdir():
        path.unlink()
    (directory / "made").rmdir()


@pytest.fixture
def run(tmp_path):
    """A run with the steps 2 and 4, whose tracker says 4."""
    for step in ("iter_0000002", "iter_0000004"):
        write(tmp_path, step)
    (tmp_path / layout.TRACKER).write_text("4")
    return tmp_path


def test_the_step_that_the_tracker_names_needs_no_warning(run, caplog):
    assert resume_point(run).iteration == 4
    assert caplog.text == ""
    assert (run / layout.TRACKER).read_text() == "4"


@pytest.mark.parametrize("content", ["", "\n", "abc", "4x", "\x00\x00"])
def test_a_damaged_tracker_is_mended_with_a_warning(run, content, caplog):
    (run / layout.TRACKER).write_text(content)
    assert resume_point(run).iteration == 4
    assert "taking iter_0000004" in caplog.text
    assert (run / layout.TRACKER).read_text() == "4"
    assert not [path for path in run.iterdir() if path.name.startswith(".")], "no temporary file is left"


def test_a_missing_tracker_is_made_with_a_warning(run, caplog):
    (run / layout.TRACKER).unlink()
    assert has_checkpoint(run)
    assert resume_point(run).iteration == 4
    assert "is missing; taking iter_0000004" in caplog.text
    assert (run / layout.TRACKER).read_text() == "4"


def test_a_damaged_last_step_falls_back_to_the_one_before(run, caplog):
    os.truncate(run / "iter_0000004" / "__0_0.distcp", 100)
    assert resume_point(run).iteration == 2
    assert "says '4'; taking iter_0000002" in caplog.text
    assert (run / layout.TRACKER).read_text() == "4", "Megatron is told the step: the file is left alone"


@pytest.mark.parametrize("read", [architecture_on_disk, layout.find, CheckpointReader])
def test_whoever_takes_another_step_than_the_tracker_names_says_so_once(run, read, caplog, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    os.truncate(run / "iter_0000004" / "__0_0.distcp", 100)
    for _ in range(2):
        read(run)
    told = f"{run / layout.TRACKER} says '4'; taking iter_0000002, the newest step that verifies (iter_0000004: "
    assert [record.getMessage()[: len(told)] for record in caplog.records] == [told]
    monkeypatch.setenv("RANK", "1")
    (run / layout.TRACKER).write_text("6")
    read(run)
    assert len(caplog.records) == 1, "on the first rank only"


def test_a_tracker_of_the_other_kind_is_mended(run):
    """Megatron takes from it whether it loads a release or a step."""
    (run / layout.TRACKER).write_text("release")
    resume_point(run)
    assert (run / layout.TRACKER).read_text() == "4"


def test_a_first_save_that_was_cut_off_is_no_checkpoint_but_what_was_complete_once_is_not_given_up(tmp_path):
    assert own_resume_point(tmp_path) is None
    write(tmp_path, "iter_0000002")
    (tmp_path / "iter_0000002" / "metadata.json").rename(tmp_path / "kept")
    assert own_resume_point(tmp_path) is None, "the tracker would be there had a save been finished"
    (tmp_path / layout.TRACKER).write_text("2")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        own_resume_point(tmp_path)
    (tmp_path / layout.TRACKER).unlink()
    (tmp_path / "kept").rename(tmp_path / "iter_0000002" / "metadata.json")
    step = own_resume_point(tmp_path)
    assert step is not None
    assert step.iteration == 2


def test_a_step_that_a_crash_interrupted_is_passed_over(run, caplog):
    (run / "iter_0000006").mkdir()
    (run / "iter_0000006" / "__0_0.distcp").write_bytes(b"half")
    assert resume_point(run).iteration == 4
    assert caplog.text == ""


def test_a_tracker_that_names_a_step_that_is_gone(run, caplog):
    (run / layout.TRACKER).write_text("8")
    assert resume_point(run).iteration == 4
    assert "says '8'; taking iter_0000004" in caplog.text


def test_nothing_valid_is_an_error_that_says_why_of_each_step(run):
    os.truncate(run / "iter_0000004" / "__0_0.distcp", 100)
    (run / "iter_0000002" / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint") as error:
        resume_point(run)
    assert "iter_0000004: the checkpoint is damaged: __0_0.distcp is cut short" in str(error.value)
    assert "iter_0000002: the checkpoint is incomplete: no metadata.json" in str(error.value)


def test_a_tracker_without_steps_is_an_error_not_a_fresh_start(tmp_path):
    (tmp_path / layout.TRACKER).write_text("4")
    assert has_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="has no steps"):
        resume_point(tmp_path)


def test_an_empty_directory_claims_nothing(tmp_path):
    assert not has_checkpoint(tmp_path)
    assert not has_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="does not exist"):
        resume_point(tmp_path / "nowhere")


def test_weights_to_start_from_are_found(tmp_path, caplog):
    write(tmp_path, "release")
    (tmp_path / layout.TRACKER).write_text("release")
    assert resume_point(tmp_path).is_release
    assert caplog.text == ""
    (tmp_path / layout.TRACKER).write_text("")
    resume_point(tmp_path)
    assert "taking release" in caplog.text
    assert (tmp_path / layout.TRACKER).read_text() == "release"


def test_a_tracker_that_cannot_be_mended_is_an_error(run):
    (run / layout.TRACKER).unlink()
    (run / layout.TRACKER).mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        resume_point(run)


def test_experts_with_an_optimizer_of_their_own_keep_it(tmp_path):
    def arguments(ep, etp=None, tp=1):
        return Namespace(
            num_experts=4, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp, tensor_model_parallel_size=tp
        )

    with writing(tmp_path / "made", EXPERTS, Namespace(expert_model_parallel_size=2)) as writer:
        for key, shape in axes.tensors(EXPERTS).items():
            writer.write(key, torch.zeros(shape))
    step = layout.newest(tmp_path / "made")
    check_experts(step, arguments(4))
    check_experts(step, arguments(1, etp=1, tp=2))
    with pytest.raises(CheckpointError, match="expert parallel size 1 and larger"):
        check_experts(step, arguments(1))


def optimizer(distributed, tp=1, pp=1, **more):
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return Namespace(use_distributed_optimizer=distributed, **sizes, **more)


@pytest.mark.parametrize(
    ("saved", "now", "said"),
    [
        (optimizer(False), optimizer(True), "without --use-distributed-optimizer"),
        (optimizer(True, dist_ckpt_optim_fully_reshardable=True), optimizer(False), "saved with --use-distributed"),
        (optimizer(True, dist_ckpt_optim_fully_reshardable=False), optimizer(True, tp=2), "TP 1, PP 1; this run: TP 2"),
        (optimizer(True), optimizer(True, pp=2), "this run: TP 1, PP 2"),
        (optimizer(False), optimizer(False, tp=2, pp=2), None),
        (optimizer(True), optimizer(True), None),
        (optimizer(True, dist_ckpt_optim_fully_reshardable=True), optimizer(True, tp=2, pp=2), None),
        (optimizer(False, no_save_optim=True), optimizer(True), None),
    ],
)
def test_an_optimizer_state_that_cannot_be_loaded_is_refused(monkeypatch, tmp_path, saved, now, said):
    monkeypatch.setattr(layout, "common", lambda step: {"args": saved})
    step = layout.Step(tmp_path / "iter_0000002", 2)
    if said is None:
        check_sharding(step, now)
        return
    with pytest.raises(CheckpointError, match=f"(?s){said}.*--no-load-optim"):
        check_sharding(step, now)
