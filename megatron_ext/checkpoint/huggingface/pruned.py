"""Families whose layers differ: what a family of transformers' cannot express after pruning, with the code that can.

The class is the family's own, rebuilt layer by layer by `modeling_pruned.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.checkpoint.huggingface.config_mappings import Layers
from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.gemma import GEMMA, GEMMA2, GEMMA3, EmbeddingScale
from megatron_ext.checkpoint.huggingface.glm import GLM, GLM4
from megatron_ext.checkpoint.huggingface.llama import LLAMA
from megatron_ext.checkpoint.huggingface.mistral import MISTRAL
from megatron_ext.checkpoint.huggingface.nemotron import NEMOTRON
from megatron_ext.checkpoint.huggingface.phi3 import PHI3
from megatron_ext.checkpoint.huggingface.qwen import QWEN2, QWEN3
from megatron_ext.checkpoint.huggingface.remote_code import (
    ENTRY,
    LINEAR_ROWS,
    LayerChanges,
    RemoteCodeFamily,
    changes_of,
)
from megatron_ext.checkpoint.huggingface.windows import SLIDING, layer_types
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION, LINEAR, MLP

_SUBLAYERS = {ATTENTION: "self_attn", MLP: "mlp"}
_OWN_NORMS = 'NORMS = {"self_attn": ("input_layernorm",), "mlp": ("post_attention_layernorm",)}'
_GLM4_NORMS = """NORMS = {
    "self_attn": ("input_layernorm", "post_self_attn_layernorm"),
    "mlp": ("post_attention_layernorm", "post_mlp_layernorm"),
}"""
_GEMMA_NORMS = """NORMS = {
    "self_attn": ("input_layernorm", "post_attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}"""
# What is called otherwise in the code, beside the class and its type.
_RENAMED = {
    "glm4": ((_OWN_NORMS, _GLM4_NORMS),),
    "gemma2": ((_OWN_NORMS, _GEMMA_NORMS),),
    "gemma3_text": (
        (_OWN_NORMS, _GEMMA_NORMS), ("(LlamaConfig)", "(Gemma3TextConfig)"),
        ("import LlamaConfig", "import Gemma3TextConfig"),
    ),
}  # fmt: skip
_SIZES = LayerChanges({"ffn_hidden_size": "intermediate_size"})


class PrunedFamily(RemoteCodeFamily):
    """`base` with layers that differ."""

    def _blocks(self, pattern: str) -> list[tuple[int, ...]]:
        return [tuple(own.values()) for own in blocks(pattern, self.block)]

    def _prefix(self, pattern: str, number: int, unit: int) -> str:
        layer = super()._prefix(pattern, number, unit)
        if pattern[unit] != LINEAR:
            return layer
        own = blocks(pattern, self.block)[number]
        return f"{layer}{_SUBLAYERS[next(kind for kind in own if own[kind] == unit)]}."


def blocks(pattern: str, block: Sequence[str]) -> list[dict[str, int]]:
    """Our sub-layers that make each layer of theirs, by the kind whose place each takes; a linear one takes any.

    Raises:
        CheckpointError: A sub-layer is of a kind that the block does not have.
    """
    found: list[dict[str, int]] = []
    unit = 0
    while unit < len(pattern):
        own: dict[str, int] = {}
        for kind in block:
            if pattern[unit : unit + 1] in (kind, LINEAR):
                own[kind] = unit
                unit += 1
        if not own:
            raise CheckpointError("the family has no such sub-layers", got=pattern[unit], legal=", ".join(block))
        found.append(own)
    return found


@dataclass(frozen=True)
class _Blocks:
    """For each layer, the sub-layers of a whole one (`block`) that it lacks or has linear maps for, and its sizes."""

    block: Sequence[str]

    def read(self, config: Config) -> dict[str, Any]:
        """The pattern and the sizes."""
        entries = changes_of(config)
        there = [(entry, kind) for entry in entries for kind in self.block]
        kinds = [
            LINEAR if _SUBLAYERS[kind] in entry.get("linear", ()) else kind
            for entry, kind in there
            if _SUBLAYERS[kind] not in entry.get("skip", ())
        ]
        return {"pattern": "".join(kinds)} | _SIZES.read(config)

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entries."""
        entries: list[dict[str, Any]] = []
        kinds = layer_types(arch, [tuple(own.values()) for own in blocks(arch.pattern, self.block)])
        for own in blocks(arch.pattern, self.block):
            lists = {
                "skip": [_SUBLAYERS[kind] for kind in self.block if kind not in own],
                "linear": [_SUBLAYERS[kind] for kind, unit in own.items() if arch.pattern[unit] == LINEAR],
            }
            entry: dict[str, Any] = {name: names for name, names in lists.items() if names}
            for unit in own.values():
                entry |= _SIZES.of(arch, unit)
            entries.append(entry)
        types = {"layer_types": kinds} if "layer_types" in like or SLIDING in kinds else {}
        return {ENTRY: entries, "num_hidden_layers": len(entries), **types}


def pruned(base: Family) -> PrunedFamily:
    """The variant of a family whose layers may differ."""
    camel, snake = base.name.removesuffix("ForCausalLM"), base.model_type
    same = (mapping for mapping in base.config if not isinstance(mapping, Layers))
    config = [EmbeddingScale(own=True) if isinstance(mapping, EmbeddingScale) else mapping for mapping in same]
    config.append(_Blocks(base.block))
    names = (
        *_RENAMED.get(snake, ()), ("pruned_llama", f"pruned_{snake}"), ('"llama"', f'"{snake}"'), ("Llama", camel),
    )  # fmt: skip
    return PrunedFamily(
        f"Pruned{base.name}", f"pruned_{snake}", base.layer, base.block, [*base.params, *LINEAR_ROWS], config,
        base.ignored_suffixes, base.ignored_fields, base=base, template="modeling_pruned.py", renamed=names,
    )  # fmt: skip


PRUNED = tuple(
    pruned(family) for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, NEMOTRON, GLM, GLM4, GEMMA, GEMMA2, GEMMA3)
)
