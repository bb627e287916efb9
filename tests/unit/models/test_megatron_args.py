"""Every argument of the installed Megatron is carried, refused, or known not to change what a model computes."""

import json
from argparse import Namespace
from dataclasses import replace

import fork_server
import pytest
from megatron_arguments import BESIDE, RENAMED, TRAINING

from megatron_ext.errors import ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.megatron_args import UNSUPPORTED, check_supported, functional_arguments, own_arguments
from megatron_ext.models.presets import PRESETS

TINY = PRESETS["tiny-hybrid"].architecture
EXPERTS = replace(TINY, pattern="M-*E", num_experts=4, moe_ffn_hidden_size=16, moe_router_topk=2)
ALL = """
import argparse, dataclasses, json
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import add_megatron_arguments
from megatron.training.models import GPTModelConfig, HybridModelConfig
parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
fields = {f.name for c in (TransformerConfig, GPTModelConfig, HybridModelConfig) for f in dataclasses.fields(c)}
from megatron_ext.models.megatron_args import check_supported
check_supported(parser.parse_args(["--hybrid-layer-pattern=M-*E"]))
print("found", json.dumps(sorted(fields | {action.dest for action in parser._actions if action.dest != "help"})))
"""


def words(groups: dict[str, str]) -> list[str]:
    return [name for text in groups.values() for name in text.split()]


def test_every_argument_of_the_installed_megatron_is_classified() -> None:
    """And its defaults are supported, for a model with experts too."""
    run = fork_server.run_code(ALL)
    assert run.returncode == 0, run.stderr[-2000:]
    found = set(json.loads(run.stdout.rpartition("found ")[2]))
    known = [*functional_arguments(), *RENAMED, *words(BESIDE), *words(TRAINING)]
    assert found - set(known) == set(), "new arguments: see tests/support/megatron_arguments.py"
    ours = {argument.name for argument in own_arguments()}
    assert set(known) - found == ours, "arguments that Megatron does not have any more"
    assert len(known) == len(set(known)), "two kinds at once"
    assert {*RENAMED.values(), *BESIDE} <= set(functional_arguments())


OTHERS = {
    "softmax_type": "off-by-one", "rotary_seq_len_interpolation_factor": 4, "rope_type": "yarn", "mtp_num_layers": 1,
    "activation_func_clamp_value": 0.0, "window_size": (128, 0), "glu_linear_offset": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_no_architecture_carries_is_refused_by_name(name: str) -> None:
    args = Namespace(**TINY.to_args())
    check_supported(args)
    setattr(args, name, OTHERS.get(name, True))
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} "):
        Architecture.from_args(args)


@pytest.mark.parametrize(
    ("name", "value"),
    [("moe_router_force_load_balancing", True), ("moe_router_force_biased", 0.5), ("moe_expert_capacity_factor", 1.0)],
)
def test_routing_that_is_not_the_models_own_is_refused_where_there_are_experts(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} "):
        Architecture.from_args(Namespace(**EXPERTS.to_args() | {name: value}))
    check_supported(Namespace(**TINY.to_args() | {name: value}))


def test_values_that_change_nothing_are_legal() -> None:
    own = {"rotary_seq_len_interpolation_factor": 1, "rope_type": "rope", "mtp_num_layers": 0}
    specs = [None, ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]]
    for spec in specs:
        check_supported(Namespace(**TINY.to_args() | own | {"spec": spec}))
    with pytest.raises(ConfigError, match="layers of your own"):
        check_supported(Namespace(**TINY.to_args(), spec=["my.layers", "stack_spec"]))
