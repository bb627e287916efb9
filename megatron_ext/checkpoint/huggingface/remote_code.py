"""Families with remote code: it lies beside the weights, and `auto_map` names it (`trust_remote_code=True`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.mappings import ParamMapping
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.dimensions import PER_LAYER
from megatron_ext.models.pattern import LINEAR

ENTRY, RANK = "layer_changes", "linear_rank"
LINEAR_ROWS = [ParamMapping(LINEAR, name, name) for name in ("down", "up", "bias")]
"""A linear sub-layer, which no class of transformers' has."""


@dataclass(frozen=True)
class RemoteCodeFamily(Family):
    """What a family of transformers' is not: it takes over where that cannot express a model.

    Attributes:
        base: The family of transformers'.
        template: The file in this folder that its code is made of.
        renamed: What is called otherwise in the code than in the template.
    """

    base: Family | None = None
    template: str = ""
    renamed: Sequence[tuple[str, str]] = ()

    @property
    def module(self) -> str:
        """The name of the code's module."""
        return f"modeling_{self.model_type}"

    def code(self) -> str:
        """The code."""
        text = Path(__file__).with_name(self.template).read_text(encoding="utf-8")
        for old, new in self.renamed:
            text = text.replace(old, new)
        return text

    def entries(self) -> dict[str, Any]:
        """What `config.json` says of the class and its code."""
        config = f"{self.name.removesuffix('ForCausalLM')}Config"
        return {
            "architectures": [self.name], "model_type": self.model_type,
            "auto_map": {"AutoConfig": f"{self.module}.{config}", "AutoModelForCausalLM": f"{self.module}.{self.name}"},
        }  # fmt: skip

    def write(self, arch: Architecture, like: Config | None = None) -> dict[str, Any]:
        """`config.json` as `Family.write`; what `like`, a configuration of `base` or of this, says otherwise stays."""
        own = self.entries()
        if like and like.get("model_type") == self.model_type:
            return super().write(arch, {**like, **own})
        return super().write(arch, own | {name: value for name, value in (like or {}).items() if name not in own})


@dataclass(frozen=True)
class LayerChanges:
    """`layer_changes`: for each layer of a model whose layers are sub-layers, its own sizes, or a linear map's rank.

    Attributes:
        sizes: Their names of our sizes that may differ.
    """

    sizes: dict[str, str]

    def read(self, config: Config) -> dict[str, Any]:
        """The sizes, and the rank."""
        entries = changes_of(config)
        ranks = {entry[RANK] for entry in entries if RANK in entry}
        if len(ranks) > 1:
            raise CheckpointError("config.json: linear sub-layers of several ranks", got=sorted(ranks), legal="one")
        sizes = {megatron: tuple(entry[hf] for entry in entries if hf in entry) for megatron, hf in self.sizes.items()}
        rank = {RANK: ranks.pop()} if ranks else {}
        return {"layer_sizes": {name: values for name, values in sizes.items() if values}} | rank

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entry."""
        return {ENTRY: [self.of(arch, unit) for unit in range(len(arch.pattern))]}

    def of(self, arch: Architecture, unit: int) -> dict[str, int]:
        """What is one sub-layer's own."""
        if arch.pattern[unit] == LINEAR:
            return {RANK: arch.linear_rank}
        return {
            hf: getattr(arch.at(unit), megatron)
            for megatron, hf in self.sizes.items()
            if PER_LAYER[megatron] == arch.pattern[unit] and megatron in arch.layer_sizes
        }


def changes_of(config: Config) -> list[dict[str, Any]]:
    """The entry of each layer.

    Raises:
        CheckpointError: There is none.
    """
    entries = config.get(ENTRY)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"config.json has no {ENTRY!r}", legal="a list with an object for each layer")
    return entries
