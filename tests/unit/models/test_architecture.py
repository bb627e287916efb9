import json
from argparse import Namespace
from dataclasses import dataclass, fields, replace

import fork_server
import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.argument_mappings import Argument, Renamed
from megatron_ext.models.megatron_args import TABLE, arguments
from megatron_ext.models.presets import PRESETS
from megatron_ext.options.early_flags import read_early

TINY = PRESETS["tiny-hybrid"].architecture
EXPERTS = replace(
    TINY, pattern="M-*E", num_experts=8, moe_ffn_hidden_size=48, moe_shared_expert_intermediate_size=32,
    moe_router_topk=3, moe_router_score_function="sigmoid", moe_router_topk_scaling_factor=2.5,
    moe_router_enable_expert_bias=True,
)  # fmt: skip

# Megatron's own defaults of the arguments that are read (options/fields.py of megatron-core 0.19.2)
MEGATRON = {argument.name: argument.default for argument in arguments() if not argument.name.startswith("ext_")} | {
    "quick_geglu": False, "vocab_size": None, "make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 1,
    "moe_router_load_balancing_type": "aux_loss", "moe_latent_size": None, "moe_shared_expert_gate": False,
    "moe_router_num_groups": None, "moe_router_group_topk": None, "moe_expert_capacity_factor": None,
    "moe_input_jitter_eps": None, "moe_apply_probs_on_input": False, "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
}  # fmt: skip
# flag -> (destination, type); store_true and store_false have a value instead of a type
FLAGS = {
    "--apply-layernorm-1p": ("layernorm_zero_centered_gamma", True),
    "--disable-bias-linear": ("add_bias_linear", False),
    "--norm-epsilon": ("layernorm_epsilon", float),
    "--rotary-percent": ("rotary_percent", float),
    "--rope-scaling-factor": ("rope_scaling_factor", float),
    "--normalization": ("normalization", str),
    "--position-embedding-type": ("position_embedding_type", str),
    "--hybrid-layer-pattern": ("hybrid_layer_pattern", str),
    "--moe-router-score-function": ("moe_router_score_function", str),
    "--moe-router-topk-scaling-factor": ("moe_router_topk_scaling_factor", float),
}


def megatron_parse(flags: list[str]) -> Namespace:
    """Megatron's parser, reduced to the flags of an architecture."""
    args, words = {"ext_linear_rank": None, **MEGATRON}, [word for flag in flags for word in flag.split("=", 1)]
    while words:
        flag = words.pop(0)
        name, kind = FLAGS.get(flag, (flag[2:].replace("-", "_"), None))
        assert name in args, flag
        if kind is None:
            kind = True if isinstance(args[name], bool) else int
        args[name] = kind if isinstance(kind, bool) else kind(words.pop(0))
    return Namespace(**args)


@pytest.mark.parametrize("name", PRESETS)
def test_flags_and_args_rebuild_every_preset(name):
    arch = PRESETS[name].architecture
    assert Architecture.from_args(megatron_parse(arch.to_flags())) == arch
    assert Architecture.from_args(Namespace(**MEGATRON | arch.to_args())) == arch
    assert Architecture.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch


@pytest.mark.parametrize(
    "change",
    [
        {"add_bias_linear": True},
        {"add_qkv_bias": True},
        {"qk_layernorm": True},
        {"norm_epsilon": 1e-6},
        {"pattern": "-M*"},
        {"pattern": "-LM*", "linear_rank": 3},
        {"pattern": "-LM*"},
    ],
)
def test_flags_rebuild_what_no_preset_has(change):
    arch = replace(TINY, **change)
    assert Architecture.from_args(megatron_parse(arch.to_flags())) == arch


def test_megatrons_defaults():
    args = {
        "hybrid_layer_pattern": "M-|*-",
        "hidden_size": 256,
        "num_attention_heads": 8,
        "max_position_embeddings": 64,
    }
    args |= {"vocab_size": 1000, "tensor_model_parallel_size": 2, "position_embedding_type": "none"}
    arch = Architecture.from_args(Namespace(**MEGATRON | args))
    assert arch.pattern == "M-*-"
    assert (arch.ffn_hidden_size, arch.kv_channels, arch.num_query_groups) == (1024, 32, 8)
    assert arch.mamba_num_heads == 2 * 256 // 64
    assert arch.padded_vocab_size == 1024
    gated = Architecture.from_args(Namespace(**MEGATRON | args | {"swiglu": True}))
    assert gated.ffn_hidden_size == 640  # 4 * 256 * 2/3 = 682, down to a multiple of 64


PARSE = """
import argparse, json, sys
from megatron.training.arguments import add_megatron_arguments
parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
names, runs = json.loads(sys.argv[1])
parsed = [{name: vars(parser.parse_args(flags))[name] for name in names} for flags in runs]
print("parsed", json.dumps(parsed))
"""


def test_the_installed_megatron_has_these_flags_and_defaults():
    """In its own process: Megatron must not be imported here, before a platform is installed."""
    archs = [PRESETS[name].architecture for name in ("tiny-hybrid", "transformer-8b", "llama3.1-8b")] + [EXPERTS]
    request = json.dumps([list(MEGATRON), [[], *(arch.to_flags() for arch in archs)]])
    run = fork_server.run_code(PARSE, request)
    assert run.returncode == 0, run.stderr[-2000:]
    defaults, *parsed = json.loads(run.stdout.rpartition("parsed ")[2])
    assert defaults == MEGATRON
    assert [Architecture.from_args(Namespace(**values)) for values in parsed] == archs


@pytest.mark.parametrize(
    ("change", "tp", "named"),
    [
        ({}, 4, "mamba_num_groups=2"),
        ({}, 4, "num_query_groups=2"),
        ({"ffn_hidden_size": 513}, 2, "ffn_hidden_size=513"),
        ({"mamba_num_heads": 15}, 1, "mamba_num_heads=15"),
        ({"num_attention_heads": 7}, 1, "num_attention_heads=7"),
        ({"padded_vocab_size": 4095}, 2, "padded_vocab_size=4095"),
    ],
)
def test_what_does_not_divide_is_named(change, tp, named):
    with pytest.raises(ConfigError, match=named) as error:
        replace(TINY, **change).validate(tp=tp)
    assert "legal: tensor parallel 1" in str(error.value)


def test_a_layer_kind_that_is_absent_constrains_nothing():
    replace(TINY, pattern="*-", mamba_num_groups=3).validate(tp=2, pp=2)
    with pytest.raises(ConfigError, match="fewer than pipeline"):
        replace(TINY, pattern="*-").validate(pp=3)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 0},
        {"pattern": "E"},
        {"pattern": "E", "num_experts": 4},
        {"activation": "gelu"},
        {"normalization": "BatchNorm"},
        {"position_embedding_type": "learned_absolute"},
        {"hidden_size": 2.5},
        {"pattern": "*L", "linear_rank": -1},
    ],
)
def test_what_cannot_be_is_refused(change):
    with pytest.raises(ConfigError):
        replace(TINY, **change)


def test_the_names_of_earlier_versions_are_read():
    """Whose `vocab_size` was the padded one; plans, scores and results of theirs have it."""
    values = TINY.to_dict()
    assert "vocab_size" not in values
    values["vocab_size"] = values.pop("padded_vocab_size")
    assert Architecture.from_dict(values) == TINY


@dataclass(frozen=True, kw_only=True)
class Gated(Architecture):
    """A model with a field more."""

    output_gate: bool = False
    gate_size: int = 0


def test_a_field_of_another_package_is_one_row_of_the_table(monkeypatch):
    """Which Megatron's arguments, flags and older checkpoints follow, and what is refused."""
    monkeypatch.setitem(TABLE, "output_gate", Renamed(Argument("attention_output_gate", False)))
    monkeypatch.setitem(TABLE, "gate_size", Renamed(Argument("gate_hidden_size", 7)))
    gated = Gated(**TINY.to_dict(), output_gate=True, gate_size=5)
    flags = gated.to_flags()
    assert [word for word in flags if "gate" in word] == ["--attention-output-gate", "--gate-hidden-size=5"]
    assert Gated.from_args(Namespace(**MEGATRON | gated.to_args())) == gated
    assert Gated.from_args(read_early(flags, {}, arguments())) == gated
    assert Gated.from_dict(json.loads(json.dumps(gated.to_dict()))) == gated
    assert Gated.from_args(Namespace(**MEGATRON | TINY.to_args())) == replace(gated, output_gate=False, gate_size=7)
    args = Namespace(**MEGATRON | gated.to_args())
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="--attention-output-gate changes"):
        Architecture.from_args(args)


def test_every_field_has_a_row():
    assert set(TABLE) == {field.name for field in fields(Architecture)}
    names = [argument.name for argument in arguments()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", [*PRESETS, "experts"])
def test_our_own_parser_reads_the_flags_too(name):
    """Which knows a model before Megatron's can be made."""
    arch = EXPERTS if name == "experts" else PRESETS[name].architecture
    assert Architecture.from_args(read_early(arch.to_flags(), {}, arguments())) == arch


def test_from_dict_names_the_nearest_field():
    with pytest.raises(ConfigError, match="did you mean 'hidden_size'"):
        Architecture.from_dict(TINY.to_dict() | {"hiden_size": 1})
    with pytest.raises(ConfigError, match="incomplete"):
        Architecture.from_dict({"pattern": "M"})


UNEVEN = replace(TINY, layer_sizes={"ffn_hidden_size": (512, 256, 512, 384, 512, 8), "mamba_num_heads": (16, 4, 8, 2)})


def test_sizes_may_differ_from_layer_to_layer():
    assert UNEVEN.ffn_hidden_size == 512
    assert UNEVEN.at(3).ffn_hidden_size == 256
    assert UNEVEN.at(2).mamba_num_heads == 4
    assert UNEVEN.at(2).layer_sizes == {}
    gated_mlp = 3 * TINY.hidden_size
    dropped_heads = 16 * 4 - (16 + 4 + 8 + 2)
    per_head = 2 * TINY.hidden_size * 32 + TINY.hidden_size + 32 * 4 + 32 + 3 + 32 + 32 * TINY.hidden_size
    fewer = gated_mlp * (6 * 512 - (512 + 256 + 512 + 384 + 512 + 8)) + per_head * dropped_heads
    assert UNEVEN.num_parameters() == TINY.num_parameters() - fewer
    assert TINY.at(3) is TINY
    equal = replace(TINY, layer_sizes={"ffn_hidden_size": (256,) * 6})
    assert equal == replace(TINY, ffn_hidden_size=256)


def test_uneven_sizes_survive_flags_arguments_and_json():
    args = {"ext_layer_sizes": UNEVEN.to_flags()[-1].removeprefix("--ext-layer-sizes=")}
    assert Architecture.from_args(Namespace(**MEGATRON | TINY.to_args() | args)) == UNEVEN
    assert Architecture.from_args(Namespace(**MEGATRON | UNEVEN.to_args())) == UNEVEN
    assert Architecture.from_dict(json.loads(json.dumps(UNEVEN.to_dict()))) == UNEVEN


def test_wrong_uneven_sizes_are_refused():
    with pytest.raises(ConfigError, match="6 positive whole numbers"):
        replace(TINY, layer_sizes={"ffn_hidden_size": (512, 256)})
    with pytest.raises(ConfigError, match="ffn_hidden_size, mamba_num_heads"):
        replace(TINY, layer_sizes={"kv_channels": (1, 2)})
    with pytest.raises(ConfigError, match="mamba_num_heads=3 does not divide"):
        replace(TINY, layer_sizes={"mamba_num_heads": (16, 3, 8, 2)}).validate()
    with pytest.raises(ConfigError, match="ffn_hidden_size=96,80"):
        Architecture.from_args(Namespace(**MEGATRON | TINY.to_args() | {"ext_layer_sizes": "ffn_hidden_size"}))


MIXTURES = [
    {}, {"moe_shared_expert_intermediate_size": 0}, {"moe_router_enable_expert_bias": False},
    {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False, "moe_router_pre_softmax": True},
    {"moe_router_topk_scaling_factor": None, "add_bias_linear": True, "moe_shared_expert_intermediate_size": 0},
]  # fmt: skip


@pytest.mark.parametrize("change", MIXTURES)
def test_mixtures_survive_flags_arguments_and_json(change):
    arch = replace(EXPERTS, **change)
    assert Architecture.from_args(megatron_parse(arch.to_flags())) == arch
    assert Architecture.from_args(Namespace(**MEGATRON | arch.to_args())) == arch
    assert Architecture.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch


def test_a_model_without_linear_sublayers_has_no_rank():
    assert replace(TINY, linear_rank=4) == TINY


def test_a_model_without_a_mixture_has_no_experts():
    assert replace(EXPERTS, pattern="M-*") == replace(TINY, pattern="M-*")
    assert "--num-experts" not in TINY.to_flags()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_router_topk": 9}, "1 to num_experts=8"),
        ({"moe_router_score_function": "softmax"}, "expert biases go with sigmoids"),
        ({"moe_router_score_function": "relu"}, "softmax, sigmoid"),
        ({"add_bias_linear": True}, "shared experts have no biases"),
        ({"num_experts": 0}, "num_experts must be a positive"),
        (
            {"moe_router_topk": 1, "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax"},
            "--moe-router-pre-softmax",
        ),
    ],
)
def test_mixtures_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(EXPERTS, **change)


@pytest.mark.parametrize(
    "asked",
    [
        {"moe_latent_size": 16}, {"moe_shared_expert_gate": True}, {"moe_router_num_groups": 2},
        {"moe_expert_capacity_factor": 1.0}, {"moe_router_load_balancing_type": ["sinkhorn"]},
    ],
)  # fmt: skip
def test_kinds_of_mixture_that_are_not_supported_are_refused(asked):
    with pytest.raises(ConfigError, match="is not supported"):
        Architecture.from_args(Namespace(**MEGATRON | EXPERTS.to_args() | asked))
    Architecture.from_args(Namespace(**MEGATRON | TINY.to_args() | asked))  # it has no mixture


def test_what_experts_must_divide_by_is_named():
    EXPERTS.validate(tp=2, ep=4, etp=1)
    for layout, message in (
        ({"ep": 3}, "num_experts=8 does not divide by expert parallel size=3"),
        ({"etp": 5}, "moe_ffn_hidden_size=48 does not divide by expert tensor parallel size=5"),
    ):
        with pytest.raises(ConfigError, match=message):
            EXPERTS.validate(**layout)
    with pytest.raises(ConfigError, match="no mixture of experts"):
        TINY.validate(ep=2)


def test_a_token_uses_the_experts_it_is_sent_to():
    expert = 3 * EXPERTS.hidden_size * 48
    assert EXPERTS.num_expert_parameters() == 8 * expert
    assert EXPERTS.num_active_parameters() == EXPERTS.num_parameters() - 5 * expert
    assert EXPERTS.num_active_parameters(embedding=False) == EXPERTS.num_parameters(embedding=False) - 5 * expert
    assert TINY.num_active_parameters() == TINY.num_parameters()
