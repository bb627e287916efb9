import json
import os
import sys
from argparse import Namespace
from dataclasses import replace
from enum import Enum
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.writer import writing
from megatron_ext.errors import CheckpointError
from megatron_ext.models import axes
from megatron_ext.models.presets import PRESETS

ARCH = replace(PRESETS["tiny-hybrid"].architecture, pattern="M*", hidden_size=16, padded_vocab_size=32)


@pytest.fixture
def saved(tmp_path):
    """A directory with the complete steps 2 and 10."""
    for iteration in (2, 10):
        with writing(tmp_path / f"made{iteration}", ARCH, Namespace(seed=iteration)) as writer:
            for key, shape in axes.tensors(ARCH).items():
                writer.write(key, torch.zeros(shape))
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / f"made{iteration}" / "release").rename(tmp_path / "run" / f"iter_{iteration:07d}")
    return tmp_path / "run"


def test_the_newest_complete_step_is_found_without_the_tracker(saved):
    (saved / layout.TRACKER).write_text("")
    assert [step.iteration for step in layout.steps(saved)] == [2, 10]
    assert layout.newest(saved).iteration == 10
    assert layout.find(saved / "iter_0000002").iteration == 2


def lacks_end_marker(step):
    (step / "metadata.json").unlink()


def lacks_data(step):
    (step / "__0_0.distcp").unlink()


def data_cut_short(step):
    os.truncate(step / "__0_0.distcp", 1000)


def index_cut_short(step):
    os.truncate(step / ".metadata", 100)


def index_empty(step):
    (step / ".metadata").write_bytes(b"")


@pytest.mark.parametrize("damage", [lacks_end_marker, lacks_data, data_cut_short, index_cut_short, index_empty])
def test_a_damaged_step_is_refused_and_passed_over(saved, damage):
    damage(saved / "iter_0000010")
    with pytest.raises(CheckpointError, match=r"incomplete|damaged"):
        layout.verify(saved / "iter_0000010")
    assert layout.newest(saved).iteration == 2
    damage(saved / "iter_0000002")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        layout.newest(saved)


def test_missing_and_foreign_directories_are_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        layout.find(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no steps"):
        layout.find(tmp_path)
    (saved / "iter_0000010" / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(CheckpointError, match="another format"):
        layout.verify(saved / "iter_0000010")
    (saved / "iter_0000010" / "mp_rank_00").mkdir()
    with pytest.raises(CheckpointError, match="legacy"):
        layout.verify(saved / "iter_0000010")


class Colour(Enum):
    RED = 1


Colour.__module__ = "megatron.core.colours"  # a class that this version does not have


def test_arguments_are_read_without_loading_foreign_classes(tmp_path, monkeypatch):
    colours = SimpleNamespace(Colour=Colour, __name__="megatron.core.colours")
    monkeypatch.setitem(sys.modules, "megatron.core.colours", colours)  # so that pickle writes it
    args = Namespace(
        seed=3, colour=Colour.RED, many=[Colour.RED], dtype=torch.bfloat16, nested={"a": 1, "b": Colour.RED}
    )
    torch.save({"args": args, "iteration": 5}, tmp_path / "common.pt")
    monkeypatch.undo()
    values = layout.common(tmp_path)
    assert values["iteration"] == 5
    assert vars(values["args"]) == {"seed": 3, "dtype": torch.bfloat16, "nested": {"a": 1}}


def test_architecture_and_fingerprint(saved):
    assert layout.architecture(saved / "iter_0000002") == ARCH
    assert layout.fingerprint(saved / "iter_0000002") != layout.fingerprint(saved / "iter_0000010")
    torch.save({"iteration": 5}, saved / "iter_0000002" / "common.pt")
    with pytest.raises(CheckpointError, match="does not say which model"):
        layout.architecture(saved / "iter_0000002")


def test_a_hugging_face_directory_is_known_and_says_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for read in (layout.find, layout.newest):
        with pytest.raises(CheckpointError, match="a Hugging Face directory") as error:
            read(tmp_path)
        assert f"megatron-ext convert --from hf --to megatron {tmp_path} NEW_DIRECTORY" in str(error.value)
