"""What is read of a command line before Megatron's parser can be made."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.models.megatron_args import arguments
from megatron_ext.options.early_flags import given_flags, read_early
from megatron_ext.options.fields import option


@dataclass(frozen=True)
class Options:
    """A job's options."""

    ranks: int | None = option(None, "Ranks.")
    states: list[str] | None = option(None, "States.")


def test_flags_and_the_values_that_follow_them() -> None:
    words = ["--a", "--b=1", "2", "--c", "x=y", "-d", "--e=f=g"]
    assert list(given_flags(words)) == [("--a", "--b=1"), ("--b", "1"), ("--c", "x=y"), ("--e", "f=g")]
    assert list(given_flags([])) == []
    assert list(given_flags(["--last"])) == [("--last", "")]


def test_others_are_left_to_megatron() -> None:
    words = ["--load", "a/b", "--lr", "1e-3", "--bf16", "--toy-states", "x", "y", "--tensor-model-parallel-size=2"]
    early = read_early(words, {"toy": Options})
    assert (early.load, early.save, early.bf16, early.dry_run) == (Path("a/b"), None, True, False)
    assert (early.tensor_model_parallel_size, early.micro_batch_size) == (2, 1)
    assert (early.toy_ranks, early.toy_states) == (None, ["x", "y"])
    assert not hasattr(early, "lr")


def test_what_describes_a_model_is_none_where_it_is_not_given() -> None:
    words = ["--hybrid-layer-pattern", "-M*", "--disable-bias-linear", "--norm-epsilon", "1e-6", "--swiglu"]
    early = read_early(words, {}, arguments())
    assert (early.hybrid_layer_pattern, early.add_bias_linear, early.layernorm_epsilon) == ("-M*", False, 1e-6)
    assert (early.swiglu, early.squared_relu, early.mamba_head_dim, early.rotary_base) == (True, None, None, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ckpt-step", "last"], "--ckpt-step: no such value"),
        (["--toy-ranks", "two"], "--toy-ranks: no such value"),
        (["--hidden-size=wide"], "--hidden-size: no such value"),
        (["--load"], "--load"),
    ],
)
def test_a_wrong_value_is_one_readable_error(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_early(words, {"toy": Options}, arguments())
