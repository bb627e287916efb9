"""What a `config.json` says, word by word: what transformers makes of it, or a refusal that names the entry."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.checkpoint.huggingface import families
from megatron_ext.errors import CheckpointError, MegatronExtError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.presets import PRESETS

ATTENTION: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
HYBRID: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 48, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2,
    "layers_block_type": ["linear_attention", "moe", "full_attention"], "n_routed_experts": 4,
    "moe_intermediate_size": 40, "moe_shared_expert_intermediate_size": 24, "num_experts_per_tok": 2,
}  # fmt: skip
MAMBA2: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8}
STATE_SPACES: dict[str, Any] = {"d_model": 32, "n_layer": 2, "vocab_size": 96, "ssm_cfg": {"layer": "Mamba2"}}
BASES = {
    "LlamaForCausalLM": ATTENTION, "MistralForCausalLM": ATTENTION | {"sliding_window": None},
    "Gemma2ForCausalLM": ATTENTION, "Gemma3ForCausalLM": ATTENTION,
    "Qwen2ForCausalLM": ATTENTION, "Qwen3ForCausalLM": ATTENTION, "NemotronForCausalLM": ATTENTION,
    "PrunedLlamaForCausalLM": ATTENTION | {"layer_changes": [{"skip": ["mlp"]}, {"intermediate_size": 24}]},
    "HybridForCausalLM": HYBRID | {"layer_changes": [{}, {}, {}], "rotary": {"rope_theta": 1e4}, "qk_norm": True,
                                   "mlp_gated": False, "mlp_hidden_act": "relu2"},
    "NemotronHForCausalLM": HYBRID, "Mamba2ForCausalLM": MAMBA2, "MambaLMHeadModel": STATE_SPACES,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MIXTURE = replace(
    PRESETS["nemotron-h-8b"].architecture, pattern="ME*", num_experts=4, moe_ffn_hidden_size=8, moe_router_topk=2,
    moe_shared_expert_intermediate_size=8, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
)  # fmt: skip


def read(name: str, **entries: Any) -> Architecture:
    """What a family reads; an entry of "absent" is left out."""
    config = BASES[name] | {"architectures": [name]} | entries
    config = {key: value for key, value in config.items() if value != "absent"}
    return families.of_config(config).read(config)


WHOLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling", None])
def test_a_share_of_rotated_channels_that_the_class_ignores_is_refused(name: str, form: str | None) -> None:
    part = {"partial_rotary_factor": 0.5}
    with pytest.raises(CheckpointError, match="'partial_rotary_factor' is ignored by transformers' class"):
        read(name, **({form: part} if form else part))
    assert read(name, partial_rotary_factor=1.0).rotary_percent == 1.0
    with pytest.raises(CheckpointError, match="the class rotates whole heads"):
        families.named(name).write(replace(read(name), rotary_percent=0.5))


def test_the_classes_that_rotate_a_part_do() -> None:
    assert read("NemotronForCausalLM").rotary_percent == 0.5
    assert read("NemotronForCausalLM", partial_rotary_factor=0.25).rotary_percent == 0.25
    hybrid = families.named("HybridForCausalLM")
    arch = replace(PRESETS["tiny-hybrid"].architecture, position_embedding_type="rope", rotary_percent=0.5)
    assert hybrid.read(hybrid.write(arch)).rotary_percent == 0.5


def test_the_older_entry_hides_the_newer() -> None:
    both = {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LLAMA3, "rope_theta": 2e4}
    arch = read("LlamaForCausalLM", **both)
    assert (arch.rotary_base, arch.rope_scaling_factor) == (20_000, 8.0)
    family = families.named("LlamaForCausalLM")
    other = replace(arch, rotary_base=7, rope_scaling_factor=None)
    assert family.read(family.write(other, BASES["LlamaForCausalLM"] | both)) == other


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in LLAMA3.items() if key != name}


WINDOW = {"use_sliding_window": True, "sliding_window": 16}
SLIDES = ["full_attention", "sliding_attention"]
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 1}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a window without a length": ("Qwen3ForCausalLM", {"layer_types": SLIDES}, "and no window"),
    "a window of text": ("MistralForCausalLM", {"sliding_window": "16"}, "'sliding_window' is of a wrong kind"),
    "scaling without a factor": ("LlamaForCausalLM", {"rope_scaling": without("factor")}, "has no 'factor'"),
    "a factor of text": ("LlamaForCausalLM", {"rope_scaling": LLAMA3 | {"factor": "8"}}, "'factor' is of a wrong kind"),
    "rotation by kind of layer": ("Qwen3ForCausalLM", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
                                  "differ by kind of layer"),
    "rotation of text": ("LlamaForCausalLM", {"rope_parameters": "default"}, "differ by kind of layer"),
    "a base of text": ("LlamaForCausalLM", {"rope_theta": "1e4"}, "'rope_theta' is of a wrong kind"),
    "a size of text": ("LlamaForCausalLM", {"hidden_size": "32"}, "'hidden_size' is of a wrong kind"),
    "a size with a fraction": ("LlamaForCausalLM", {"intermediate_size": 48.0}, "'intermediate_size' is of a wrong"),
    "no heads": ("LlamaForCausalLM", {"num_attention_heads": 0}, "'num_attention_heads' is of a wrong kind"),
    "layers of text": ("LlamaForCausalLM", {"num_hidden_layers": "2"}, "'num_hidden_layers' is of a wrong kind"),
    "an epsilon of text": ("LlamaForCausalLM", {"rms_norm_eps": "1e-6"}, "'rms_norm_eps' is of a wrong kind"),
    "an epsilon that is none": ("LlamaForCausalLM", {"rms_norm_eps": float("nan")}, "'rms_norm_eps' is of a wrong"),
    "tied by text": ("LlamaForCausalLM", {"tie_word_embeddings": "false"}, "'tie_word_embeddings' is of a wrong kind"),
    "biases by text": ("LlamaForCausalLM", {"attention_bias": "no", "mlp_bias": "no"}, "'attention_bias' is of a wro"),
    "heads that do not divide": ("LlamaForCausalLM", {"num_attention_heads": 5, "num_key_value_heads": 5}, "divides"),
    "a name that is no list": ("LlamaForCausalLM", {"architectures": "LlamaForCausalLM"}, "no list of names"),
    "lists of names": ("LlamaForCausalLM", {"architectures": [["LlamaForCausalLM"]]}, "no list of names"),
    "one expert, divided by itself": ("NemotronHForCausalLM", EXPERTS, "'norm_topk_prob' is not supported"),
    "experts that are not divided": ("NemotronHForCausalLM", {"norm_topk_prob": False}, "'norm_topk_prob' is not su"),
    "layers that are no list": ("NemotronHForCausalLM", {"layers_block_type": "moe"}, "'layers_block_type' is no list"),
    "layers that are no words": ("NemotronHForCausalLM", {"layers_block_type": [1]}, "unknown kinds of layer"),
    "an old pattern that is none": ("NemotronHForCausalLM", {"layers_block_type": None, "hybrid_override_pattern": 3},
                                    "'hybrid_override_pattern' is no text"),
    "a limit under its older name": ("NemotronHForCausalLM", {"mamba_dt_limit": [0.01, 0.1]}, "'mamba_dt_limit' is no"),
    "a limit of one number": ("Mamba2ForCausalLM", {"time_step_limit": 3}, "'time_step_limit' is not supported"),
    "a width that heads do not make": ("Mamba2ForCausalLM", {"num_heads": 7}, "is not num_heads"),
    "a limit of mamba_ssm": ("MambaLMHeadModel", {"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.0, 0.1]}}, "'dt_limi"),
    "heads that mamba_ssm refuses": ("MambaLMHeadModel", {"ssm_cfg": {"layer": "Mamba2", "headdim": 48}},
                                     "the heads do not make the inner width"),
    "an entry that is not known": ("MambaLMHeadModel", {"ssm_cfg": {"layer": "Mamba2", "gate": 1}}, "not known(.|\n)*"),
    "arguments that are none": ("MambaLMHeadModel", {"ssm_cfg": 5}, "'ssm_cfg' is no object"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "entries", "message"), REFUSED.values(), ids=REFUSED)
def test_what_our_models_cannot_be_is_named(name: str, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(name, **entries)


OPTIONAL = (
    "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "rope_theta", "time_step_limit", "n_groups",
    "max_window_layers", "use_sliding_window", "hybrid_override_pattern", "tie_embeddings", "partial_rotary_factor",
)  # fmt: skip
JUNK = ("text", -1, 2.5, True, [], {}, [None], {"a": {}})


@pytest.mark.parametrize("name", BASES)
def test_no_entry_of_any_kind_raises_anything_else(name: str) -> None:
    for entry in (*BASES[name], *OPTIONAL, "architectures"):
        for junk in JUNK:
            with contextlib.suppress(MegatronExtError):
                read(name, **{entry: junk})
    for change in ({"skip": 5}, {"skip": [None]}, {"intermediate_size": "24"}, {"intermediate_size": []}):
        with contextlib.suppress(MegatronExtError):
            read(name, layer_changes=[change, {}, {}])


ACCEPTED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a window as long as the context": ("MistralForCausalLM", {"sliding_window": 64}, {}),
    "a window and no context": ("MistralForCausalLM", {"sliding_window": 4096, "max_position_embeddings": "absent"},
                                {"attention_windows": (4096, 4096)}),
    "the window that is meant": ("MistralForCausalLM", {"sliding_window": "absent", "max_position_embeddings": 8192},
                                 {"attention_windows": (4096, 4096)}),
    "one layer with a window": ("Qwen3ForCausalLM", WINDOW | {"layer_types": SLIDES}, {"attention_windows": (0, 16)}),
    "upper layers with a window": ("Qwen2ForCausalLM", WINDOW | {"max_window_layers": 1},
                                   {"attention_windows": (0, 16)}),
    "all layers but every other": ("Gemma2ForCausalLM", {"sliding_window": 16}, {"attention_windows": (16, 0)}),
    "a window longer than the context": ("Gemma3ForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
                                         {"attention_windows": (4096, 4096), "local_rotary_base": 10_000,
                                          "rotary_base": 1_000_000}),
    "logits without a bound": ("Gemma2ForCausalLM", {"final_logit_softcapping": None},
                               {"logits_softcap": None, "attention_softcap": 50.0}),
    "a window that is off": ("Qwen2ForCausalLM", {"sliding_window": 16}, {}),
    "a window that no layer has": ("Qwen2ForCausalLM", WINDOW, {}),
    "a window that no layer names": ("Qwen3ForCausalLM", WINDOW | {"max_window_layers": 0,
                                     "layer_types": ["full_attention"] * 2}, {}),
    "eight groups where there is no entry": ("MistralForCausalLM", {"num_key_value_heads": "absent",
                                             "num_attention_heads": 16}, {"num_query_groups": 8}),
    "as many groups as heads where it is null": ("MistralForCausalLM", {"num_key_value_heads": None},
                                                 {"num_query_groups": 4}),
    "one expert, as it is": ("NemotronHForCausalLM", EXPERTS | {"norm_topk_prob": False}, {"moe_router_topk": 1}),
    "no factor": ("NemotronHForCausalLM", {"routed_scaling_factor": None}, {"moe_router_topk_scaling_factor": 1.0}),
    "what only new weights need": ("MambaLMHeadModel", {"ssm_cfg": {"layer": "Mamba2", "dt_min": 0.01,
                                   "dt_limit": [0.0, {"__float__": "Infinity"}], "headdim": 16}},
                                   {"mamba_num_heads": 4}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "entries", "fields"), ACCEPTED.values(), ids=ACCEPTED)
def test_what_they_can_be_is_read(name: str, entries: dict[str, Any], fields: dict[str, Any]) -> None:
    arch = read(name, **entries)
    assert {field: getattr(arch, field) for field in fields} == fields


def test_mixtures_are_written_as_they_are_or_not_at_all() -> None:
    family = families.named("NemotronHForCausalLM")
    assert family.write(MIXTURE)["routed_scaling_factor"] == 1.0  # none is one
    single = family.write(replace(MIXTURE, moe_router_topk=1))
    assert (single["num_experts_per_tok"], single["norm_topk_prob"]) == (1, False)
    for name in ("NemotronHForCausalLM", "HybridForCausalLM"):
        with pytest.raises(CheckpointError, match="needs a shared expert"):
            families.named(name).write(replace(MIXTURE, moe_shared_expert_intermediate_size=0))
        with pytest.raises(CheckpointError, match="two others or more"):
            families.named(name).write(replace(MIXTURE, num_experts=1, moe_router_topk=1))
