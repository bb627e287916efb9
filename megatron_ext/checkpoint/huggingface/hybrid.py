"""`HybridForCausalLM`, our own class: hybrids that are no Nemotron-H, such as the 8B Mamba-2-Hybrid with its GELU.

It is `NemotronHForCausalLM` with any MLP, with rotary positions and norms on query and key where the model has them,
with sizes that differ from layer to layer, and with or without attention (`modeling_hybrid.py`).
"""

from dataclasses import replace
from typing import Any

from megatron_ext.checkpoint.huggingface.config_mappings import Renamed, Rope, Tied
from megatron_ext.checkpoint.huggingface.entries import flag
from megatron_ext.checkpoint.huggingface.family import Config
from megatron_ext.checkpoint.huggingface.mamba2 import MIXER, OUTER
from megatron_ext.checkpoint.huggingface.mappings import ParamMapping, gated_mlp_mapping
from megatron_ext.checkpoint.huggingface.nemotron_h import (
    ATTENTION_ROWS,
    EXPERTS,
    NEMOTRON_H,
    SHARED,
    WORDS,
    LayerKinds,
)
from megatron_ext.checkpoint.huggingface.remote_code import (
    LINEAR_ROWS,
    RANK,
    LayerChanges,
    RemoteCodeFamily,
    changes_of,
)
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import LINEAR, MLP, MOE

_ROPE = Rope(partial=True)
_ACTIVATIONS = {"relu2": "squared_relu", "gelu": "gelu", "silu": "silu"}


def _gated(arch: Architecture) -> bool:
    return arch.gated_linear_unit


_MLP = [
    ParamMapping("-", "norm.weight", "mlp.linear_fc1.layer_norm_weight"),
    *gated_mlp_mapping("mixer.gate_proj.weight", "mixer.up_proj.weight", "mlp.linear_fc1.weight", exists=_gated),
    ParamMapping("-", "mixer.up_proj.weight", "mlp.linear_fc1.weight", exists=lambda arch: not _gated(arch)),
    ParamMapping("-", "mixer.down_proj.weight", "mlp.linear_fc2.weight"),
]
_QK_NORMS = [
    ParamMapping("*", "mixer.q_norm.weight", "self_attention.q_layernorm.weight"),
    ParamMapping("*", "mixer.k_norm.weight", "self_attention.k_layernorm.weight"),
]


_LINEAR = [replace(row, hf=f"mixer.{row.hf}") for row in LINEAR_ROWS]


class _Mlp:
    """The activation, and whether it is that of a gate; refuses what the class cannot run."""

    def read(self, config: Config) -> dict[str, Any]:
        """The fields."""
        name = config.get("mlp_hidden_act", "relu2")
        if name not in _ACTIVATIONS:
            raise CheckpointError("config.json: unknown 'mlp_hidden_act'", got=name, legal=", ".join(_ACTIVATIONS))
        return {"activation": _ACTIVATIONS[name], "gated_linear_unit": flag(config, "mlp_gated", False)}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entries."""
        if MOE in arch.pattern and (arch.gated_linear_unit or arch.activation != "squared_relu"):
            raise CheckpointError("HybridForCausalLM: experts are squared ReLU without a gate", got=arch.activation)
        name = next((hf for hf, megatron in _ACTIVATIONS.items() if megatron == arch.activation), None)
        if name is None:
            raise CheckpointError("HybridForCausalLM has no such activation", got=arch.activation)
        return {"mlp_hidden_act": name, "mlp_gated": arch.gated_linear_unit}


class _Kinds(LayerKinds):
    """The layer pattern; a linear sub-layer is in the place of an MLP, and `layer_changes` says its rank."""

    def read(self, config: Config) -> dict[str, Any]:
        """The pattern."""
        pattern, entries = super().read(config)["pattern"], changes_of(config)
        changed = (LINEAR if RANK in entry else unit for unit, entry in zip(pattern, entries, strict=True))
        return {"pattern": "".join(changed)}


class _Rotary:
    """Rotary positions under `rotary`, as transformers' `rope_parameters`; null without."""

    def read(self, config: Config) -> dict[str, Any]:
        """The fields."""
        if not config.get("rotary"):
            return {"position_embedding_type": "none"}
        return _ROPE.read({"rope_parameters": config["rotary"]})

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entry."""
        if arch.position_embedding_type != "rope":
            return {"rotary": None}
        return {"rotary": _ROPE.write(arch, {"rope_parameters": {}})["rope_parameters"]}


HYBRID = RemoteCodeFamily(
    "HybridForCausalLM", "megatron_hybrid", "backbone.layers.{}", "",
    [*OUTER, *MIXER, *ATTENTION_ROWS, *_QK_NORMS, *_MLP, *EXPERTS, *_LINEAR],
    [_Kinds({**WORDS, LINEAR: WORDS[MLP]}), *SHARED, Tied(), _Mlp(), _Rotary(),
     Renamed("qk_norm", "qk_layernorm", False),
     LayerChanges({"ffn_hidden_size": "intermediate_size", "mamba_num_heads": "mamba_num_heads"})],
    base=NEMOTRON_H, template="modeling_hybrid.py",
)  # fmt: skip
