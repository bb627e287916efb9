from dataclasses import replace

import pytest
import torch

from megatron_ext.errors import PlanError
from megatron_ext.models.presets import PRESETS
from megatron_ext.pruning.scores import Scores, shapes

ARCH = PRESETS["tiny-hybrid"].architecture


def scores(**changes) -> Scores:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(shape, generator=generator) for name, shape in shapes(ARCH).items()}
    return Scores(values=values | changes, architecture=ARCH, model="run", iteration=3, data="text", seed=5, samples=7)


def test_names_and_shapes():
    arch = replace(ARCH, pattern="M--*")
    names = shapes(arch)
    assert {name: shape for name, shape in names.items() if not name.startswith("depth.")} == {
        "hidden": (256,), "layers.0.mamba": (16, 32), "layers.0.state": (2, 32), "layers.1.ffn": (512,),
        "layers.2.ffn": (512,), "layers.3.query_head": (8,),
    }  # fmt: skip
    assert (names["depth.loss"], names["depth.relative_l1.blocks"]) == ((4,), (2,))
    assert names["depth.shapley_loss.blocks.stderr"] == names["depth.shapley_loss.blocks.ci95"] == (2,)
    assert (names["depth.scan_loss.3"], names["depth.scan_task.blocks.1"]) == ((2,), (2,))
    assert "depth.scan_loss.4" not in names


def test_saving_and_loading_is_exact(tmp_path):
    before = scores()
    before.save(tmp_path / "scores.safetensors")
    after = Scores.load(tmp_path / "scores.safetensors")
    assert replace(after, values={}) == replace(before, values={})
    assert after.values.keys() == before.values.keys()
    assert all(torch.equal(after.values[name], value) for name, value in before.values.items())
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


def test_what_does_not_belong_is_refused():
    with pytest.raises(PlanError, match="unknown score 'hiden'") as error:
        scores(hiden=torch.ones(256))
    assert "did you mean 'hidden'?" in str(error.value)
    with pytest.raises(PlanError, match="wrong shape"):
        scores(hidden=torch.ones(255))
    with pytest.raises(PlanError, match="not finite"):
        scores(hidden=torch.full((256,), float("nan")))
    with pytest.raises(PlanError, match="lack 'hidden'"):
        Scores(values={}, architecture=ARCH)["hidden"]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "scores.safetensors"
    with pytest.raises(PlanError, match="does not exist"):
        Scores.load(path)
    scores().save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PlanError, match="damaged"):
        Scores.load(path)
