"""`MambaLMHeadModel`: Mamba-2 in the layout of the state-spaces organisation, mamba_ssm's own."""

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import Any, ClassVar

from megatron_ext.checkpoint.huggingface.config_mappings import Fixed, Layers, Renamed, Required
from megatron_ext.checkpoint.huggingface.entries import flag, whole
from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.mamba2 import MIXER, OUTER, is_unlimited
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import CONV_KERNEL, Architecture


class _Mixer:
    """`ssm_cfg`: the arguments of mamba_ssm's layer; those that are missing have its defaults."""

    SAME: ClassVar = {
        "d_state": ("mamba_state_dim", 128),
        "headdim": ("mamba_head_dim", 64),
        "ngroups": ("mamba_num_groups", 1),
    }
    ONLY: ClassVar[dict[str, Any]] = {
        "layer": "Mamba2", "d_conv": CONV_KERNEL, "rmsnorm": True, "norm_before_gate": False, "bias": False,
        "conv_bias": True, "d_ssm": None, "D_has_hdim": False, "learnable_init_states": False,
    }  # fmt: skip
    # What new weights are made of, and how the layer is run.
    FREE = (
        "dt_min", "dt_max", "dt_init_floor", "A_init_range", "conv_init", "chunk_size", "use_mem_eff_path",
        "sequence_parallel", "process_group",
    )  # fmt: skip

    def read(self, config: Config) -> dict[str, Any]:
        """The fields."""
        given = config["ssm_cfg"]
        if not isinstance(given, Mapping):
            raise CheckpointError("config.json: 'ssm_cfg' is no object", got=repr(given))
        for name, legal in self.ONLY.items():
            got = given.get(name, "Mamba1" if name == "layer" else legal)
            if got != legal:
                raise CheckpointError(
                    f"config.json: ssm_cfg {name!r} is not supported", got=repr(got), legal=repr(legal)
                )
        limit, activation = given.get("dt_limit", (0.0, inf)), given.get("activation", "swish")
        if not is_unlimited(limit) or activation not in ("swish", "silu"):
            raise CheckpointError(
                "config.json: ssm_cfg 'dt_limit' or 'activation' is not supported", got=f"{limit}, {activation}",
                legal="[0.0, Infinity], swish",
            )  # fmt: skip
        known = {*self.SAME, *self.ONLY, *self.FREE, "expand", "dt_limit", "activation"}
        if unknown := sorted(set(given) - known):
            raise CheckpointError("config.json: ssm_cfg has entries that are not known", got=", ".join(unknown))
        fields = {megatron: whole(given, name, default) for name, (megatron, default) in self.SAME.items()}
        inner = whole(given, "expand", 2) * whole(config, "d_model", 2560)
        if inner % fields["mamba_head_dim"]:
            raise CheckpointError(
                "config.json: the heads do not make the inner width", legal="a width that headdim divides",
                got=f"expand * d_model = {inner}, headdim = {fields['mamba_head_dim']}",
            )  # fmt: skip
        return fields | {
            "mamba_num_heads": inner // fields["mamba_head_dim"], "num_attention_heads": fields["mamba_num_groups"],
            "num_query_groups": fields["mamba_num_groups"],
        }  # fmt: skip

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The arguments that are not the defaults."""
        if arch.mamba_inner_size % arch.hidden_size:
            raise CheckpointError(
                "MambaLMHeadModel needs an inner width that is a whole multiple of the hidden size",
                got=f"{arch.mamba_inner_size} and {arch.hidden_size}",
            )
        values = {name: getattr(arch, megatron) for name, (megatron, _) in self.SAME.items()}
        return {"ssm_cfg": {"layer": "Mamba2", **values, "expand": arch.mamba_inner_size // arch.hidden_size}}


class _Vocabulary:
    """The embedding has as many rows as the vocabulary, padded, needs."""

    def read(self, config: Config) -> dict[str, Any]:
        """The rows."""
        multiple = whole(config, "pad_vocab_size_multiple", 8)
        return {"padded_vocab_size": -(-whole(config, "vocab_size", 50_277) // multiple) * multiple}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The rows, all of them words, unless the vocabulary is as it was."""
        if "vocab_size" in like and self.read(like)["padded_vocab_size"] == arch.padded_vocab_size:
            return {}
        return {"vocab_size": arch.padded_vocab_size, "pad_vocab_size_multiple": 1}


class _Tied:
    """Whether the output layer is the word embedding."""

    def read(self, config: Config) -> dict[str, Any]:
        """The field."""
        return {"untie_embeddings_and_output_weights": not flag(config, "tie_embeddings", True)}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entry."""
        return {"tie_embeddings": not arch.untie_embeddings_and_output_weights}


STATE_SPACES = Family(
    "MambaLMHeadModel", "", "backbone.layers.{}", "M",
    [*(replace(mapping, hf=mapping.hf.replace("embeddings", "embedding")) for mapping in OUTER), *MIXER],
    [Layers("M", "n_layer", 64), Renamed("d_model", "hidden_size", 2560), _Vocabulary(), _Mixer(), _Tied(),
     Required("rms_norm", True), Required("d_intermediate", 0), Required("attn_layer_idx", [], None),
     Fixed(normalization="RMSNorm", norm_epsilon=1e-5, max_position_embeddings=2**20, position_embedding_type="none",
            add_bias_linear=False)],
    ignored_fields=("max_position_embeddings",),
)  # fmt: skip
