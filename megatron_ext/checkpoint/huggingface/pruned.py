"""Families whose layers differ: what a family of transformers' cannot express after pruning, with the code that can.

The class is the family's own, rebuilt layer by layer by `modeling_pruned.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.checkpoint.huggingface.config_mappings import Layers
from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.llama import LLAMA
from megatron_ext.checkpoint.huggingface.mistral import MISTRAL
from megatron_ext.checkpoint.huggingface.nemotron import NEMOTRON
from megatron_ext.checkpoint.huggingface.phi3 import PHI3
from megatron_ext.checkpoint.huggingface.qwen import QWEN2, QWEN3
from megatron_ext.checkpoint.huggingface.remote_code import ENTRY, LayerChanges, RemoteCodeFamily, changes_of
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION, MLP

_SUBLAYERS = {ATTENTION: "self_attn", MLP: "mlp"}
_SIZES = LayerChanges({"ffn_hidden_size": "intermediate_size"})


class PrunedFamily(RemoteCodeFamily):
    """`base` with layers that differ."""

    def _blocks(self, pattern: str) -> list[tuple[int, ...]]:
        return [units for units, _ in blocks(pattern, self.block)]


def blocks(pattern: str, block: Sequence[str]) -> list[tuple[tuple[int, ...], str]]:
    """Our sub-layers that make each layer of theirs, and the kinds that the layer lacks.

    Raises:
        CheckpointError: A sub-layer is of a kind that the block does not have.
    """
    found: list[tuple[tuple[int, ...], str]] = []
    unit = 0
    while unit < len(pattern):
        own, lacking = [], ""
        for kind in block:
            if pattern[unit : unit + 1] == kind:
                own.append(unit)
                unit += 1
            else:
                lacking += kind
        if not own:
            raise CheckpointError("the family has no such sub-layers", got=pattern[unit], legal=", ".join(block))
        found.append((tuple(own), lacking))
    return found


@dataclass(frozen=True)
class _Blocks:
    """For each layer, the sub-layers of a whole one (`block`) that it lacks, and the sizes that are its own."""

    block: Sequence[str]

    def read(self, config: Config) -> dict[str, Any]:
        """The pattern and the sizes."""
        entries = changes_of(config)
        kinds = [kind for entry in entries for kind in self.block if _SUBLAYERS[kind] not in entry.get("skip", ())]
        return {"pattern": "".join(kinds)} | _SIZES.read(config)

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entries."""
        entries: list[dict[str, Any]] = []
        for units, lacking in blocks(arch.pattern, self.block):
            entry: dict[str, Any] = {"skip": [_SUBLAYERS[kind] for kind in lacking]} if lacking else {}
            for unit in units:
                entry |= _SIZES.of(arch, unit)
            entries.append(entry)
        types = {"layer_types": ["full_attention"] * len(entries)} if "layer_types" in like else {}
        return {ENTRY: entries, "num_hidden_layers": len(entries), **types}


def pruned(base: Family) -> PrunedFamily:
    """The variant of a family whose layers may differ."""
    camel, snake = base.name.removesuffix("ForCausalLM"), base.model_type
    config = [*(mapping for mapping in base.config if not isinstance(mapping, Layers)), _Blocks(base.block)]
    names = ("pruned_llama", f"pruned_{snake}"), ('"llama"', f'"{snake}"'), ("Llama", camel)
    return PrunedFamily(
        f"Pruned{base.name}", f"pruned_{snake}", base.layer, base.block, base.params, config, base.ignored_suffixes,
        base.ignored_fields, base=base, template="modeling_pruned.py", renamed=names,
    )  # fmt: skip


PRUNED = tuple(pruned(family) for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, NEMOTRON))
