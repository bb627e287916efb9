"""`HybridForCausalLM`, our own class: hybrids that are no Nemotron-H, such as the 8B Mamba-2-Hybrid with its GELU.

It is `NemotronHForCausalLM` with any MLP, with rotary positions and norms on query and key where the model has them,
with sizes that differ from layer to layer, and with or without attention (`modeling_hybrid.py`).
"""

from typing import Any

from megatron_ext.checkpoint.huggingface.coded import CodedFamily, LayerChanges
from megatron_ext.checkpoint.huggingface.family import Config, Link
from megatron_ext.checkpoint.huggingface.mamba2 import MIXER, OUTER
from megatron_ext.checkpoint.huggingface.nemotron_h import ATTENTION_ROWS, EXPERTS, NEMOTRON_H, SHARED
from megatron_ext.checkpoint.huggingface.parts import half
from megatron_ext.checkpoint.huggingface.settings import Rope, Same, Tied, flag
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import MOE

_ROPE = Rope(partial=True)
_ACTIVATIONS = {"relu2": "squared_relu", "gelu": "gelu", "silu": "silu"}


def _gated(arch: Architecture) -> bool:
    return arch.gated_linear_unit


_MLP = [
    Link("-", "norm.weight", "mlp.linear_fc1.layer_norm_weight"),
    Link("-", "mixer.gate_proj.weight", "mlp.linear_fc1.weight", half(0), exists=_gated),
    Link("-", "mixer.up_proj.weight", "mlp.linear_fc1.weight", half(1), exists=_gated),
    Link("-", "mixer.up_proj.weight", "mlp.linear_fc1.weight", exists=lambda arch: not _gated(arch)),
    Link("-", "mixer.down_proj.weight", "mlp.linear_fc2.weight"),
]
_QK_NORMS = [
    Link("*", "mixer.q_norm.weight", "self_attention.q_layernorm.weight"),
    Link("*", "mixer.k_norm.weight", "self_attention.k_layernorm.weight"),
]


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
        name = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == arch.activation)
        return {"mlp_hidden_act": name, "mlp_gated": arch.gated_linear_unit}


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


HYBRID = CodedFamily(
    "HybridForCausalLM", "megatron_hybrid", "backbone.layers.{}", "",
    [*OUTER, *MIXER, *ATTENTION_ROWS, *_QK_NORMS, *_MLP, *EXPERTS],
    [*SHARED, Tied(), _Mlp(), _Rotary(), Same("qk_norm", "qk_layernorm", False),
     LayerChanges({"ffn_hidden_size": "intermediate_size", "mamba_num_heads": "mamba_num_heads"})],
    base=NEMOTRON_H, template="modeling_hybrid.py",
)  # fmt: skip
