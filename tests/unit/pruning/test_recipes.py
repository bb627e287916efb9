"""The recipes in examples/ make the architectures that the papers publish."""

import argparse
from pathlib import Path

import pytest
import torch

from megatron_ext.models.presets import PRESETS
from megatron_ext.options.fields import add_options, read_options
from megatron_ext.pruning.options import PruneOptions
from megatron_ext.pruning.plan import differences
from megatron_ext.pruning.scores import Scores, depth, shapes
from megatron_ext.pruning.select import make_plan

FOLDER = Path(__file__).parents[3] / "examples" / "prune"
SOURCES = {
    "minitron-8b": "nemotron-4-15b", "minitron-4b": "minitron-8b", "llama3.1-minitron-4b-width": "llama3.1-8b",
    "llama3.1-minitron-4b-depth": "llama3.1-8b", "mn-minitron-8b": "mistral-nemo-12b", "nemotron-h-4b": "nemotron-h-8b",
}  # fmt: skip
# The papers' tables: layers, hidden, FFN, query heads, key/value groups; parameters in billions, and their rounding.
PUBLISHED = {
    "minitron-8b": ((32, 4096, 16384, 48, 8), 8.27, 0.005),
    "minitron-4b": ((32, 3072, 9216, 24, 8), 4.19, 0.005),
    "llama3.1-minitron-4b-width": ((32, 3072, 9216, 32, 8), 4.5, 0.05),
    "llama3.1-minitron-4b-depth": ((16, 4096, 14336, 32, 8), 4.5, 0.05),
    "mn-minitron-8b": ((40, 4096, 11520, 32, 8), 8.4, 0.05),
    "nemotron-h-4b": ((28, 3072, 12288, 32, 8), 4, 0.5),
}


def options(recipe: str) -> PruneOptions:
    lines = (FOLDER / "recipes" / f"{recipe}.flags").read_text().splitlines()
    words = " ".join(line for line in lines if not line.startswith("#")).split()
    parser = add_options(argparse.ArgumentParser(), PruneOptions, "prune")
    return read_options(parser.parse_args(words), PruneOptions, "prune")


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in (FOLDER / "recipes").iterdir()} == SOURCES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("recipe", SOURCES)
def test_a_recipe_makes_the_published_architecture(recipe: str) -> None:
    source = PRESETS[SOURCES[recipe]].architecture
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(shape, generator=generator) for name, shape in shapes(source).items()}
    asked = options(recipe)
    target = make_plan(Scores(values=values, architecture=source), source, asked.targets()).target
    assert differences(PRESETS[recipe].architecture, target) == ""
    sizes, billions, rounding = PUBLISHED[recipe]
    layers = len(target.layers.blocks)
    heads = (target.num_attention_heads, target.num_query_groups)
    assert (layers, target.hidden_size, target.ffn_hidden_size, *heads) == sizes
    assert target.num_parameters() / 1e9 == pytest.approx(billions, abs=1.01 * rounding)
    assert asked.samples == 1024


def test_the_depth_recipe_drops_one_run() -> None:
    source = PRESETS["llama3.1-8b"].architecture
    scan = "depth.scan_task.blocks.16"
    assert scan in shapes(source)
    values = {name: torch.rand(shape) for name, shape in shapes(source).items() if name.startswith(depth("loss"))}
    values[scan] = -torch.eye(17)[16]  # without layers 16 to 31 the task loses least
    plan = make_plan(
        Scores(values=values, architecture=source), source, options("llama3.1-minitron-4b-depth").targets()
    )
    assert plan.units == tuple(range(32))
