"""The flags of distillation: weights over the training, what does not go together, and the papers' recipes."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.distillation.logit_cache.cache import Cache
from megatron_ext.distillation.options import DistillOptions, check_weights, objective_at, source_of, states_weight_at
from megatron_ext.distillation.teachers.teacher import Teacher
from megatron_ext.errors import ConfigError
from megatron_ext.options.fields import add_options, read_options

RECIPES = Path(__file__).parents[3] / "examples" / "distill" / "recipes"
TEACHER = Teacher.__new__(Teacher)  # whose weights do not matter here


def test_weights_go_in_a_line() -> None:
    options = DistillOptions(kd_weight="1:0", ce_weight="0.5", states_weight="2:4")
    assert [objective_at(options, TEACHER, share).kd_weight for share in (0.0, 0.25, 1.0, 2.0)] == [1, 0.75, 0, 0]
    assert objective_at(options, TEACHER, 0.3).ce_weight == 0.5
    assert states_weight_at(options, 0.5) == 3
    assert states_weight_at(DistillOptions(), 0.5) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states_weight": "much"}, "--distill-states-weight is no weight"),
        ({"states_weight": "-1:1"}, "must not be negative"),
        ({"states_loss": "l1"}, "unknown --distill-states-loss"),
        ({"states": ["final"], "kd_weight": "1:0", "ce_weight": "1"}, "balances the states' loss"),
        ({"kd_weight": "0", "ce_weight": "0"}, "nor both zero"),
    ],
)
def test_weights_that_are_illegal(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_weights(replace(DistillOptions(), **changes), TEACHER, 100)


@pytest.mark.parametrize(
    "changes",
    [{"states": ["final"]}, {"correct_teacher": "first"}, {"teacher_ranks": 2}, {"teacher": "somewhere"}],
)
def test_a_cache_has_no_teacher_to_run(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "find", lambda path: path)
    assert source_of(DistillOptions(cache="cache")) == "cache"
    with pytest.raises(ConfigError, match=r"a cache has no teacher to run|one too many"):
        source_of(replace(DistillOptions(cache="cache"), **changes))


@pytest.mark.parametrize(("name", "tokens"), [("llama3.1-minitron-4b", 94e9), ("mn-minitron-8b", 380e9)])
def test_recipes_are_the_papers(name: str, tokens: float) -> None:
    lines = (RECIPES / f"{name}.flags").read_text().splitlines()
    words = " ".join(line for line in lines if not line.startswith("#")).split()
    parser = add_options(argparse.ArgumentParser(), DistillOptions, prefix="distill")
    for flag in ("--global-batch-size", "--seq-length", "--train-iters", "--lr-warmup-iters"):
        parser.add_argument(flag, type=int)
    for flag in ("--lr", "--min-lr"):
        parser.add_argument(flag, type=float)
    parser.add_argument("--lr-decay-style")
    flags = parser.parse_args(words)
    assert flags.train_iters * flags.global_batch_size * flags.seq_length == pytest.approx(tokens, rel=1e-3)
    assert flags.lr == 1e-4
    options = read_options(flags, DistillOptions, "distill")
    assert options.correct_teacher == "first"
    assert objective_at(options, TEACHER, 0.0).divergence == "forward-kl"
