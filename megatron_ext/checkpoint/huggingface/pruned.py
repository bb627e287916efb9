"""Families whose layers differ: what a family of transformers' cannot express after pruning, with the code that can.

The class is the family's own, rebuilt layer by layer by `modeling_pruned.py`, which is written beside the weights and
which `auto_map` names. `pruned_layers` of `config.json` says what each layer is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.llama import LLAMA
from megatron_ext.checkpoint.huggingface.mistral import MISTRAL
from megatron_ext.checkpoint.huggingface.nemotron import NEMOTRON
from megatron_ext.checkpoint.huggingface.nemotron_h import NEMOTRON_H
from megatron_ext.checkpoint.huggingface.qwen import QWEN2, QWEN3
from megatron_ext.checkpoint.huggingface.settings import Layers
from megatron_ext.errors import CheckpointError
from megatron_ext.models.config import PER_LAYER, Architecture
from megatron_ext.models.pattern import ATTENTION, MLP

ENTRY = "pruned_layers"
_TEMPLATE = Path(__file__).with_name("modeling_pruned.py")
_SUBLAYERS = {ATTENTION: "self_attn", MLP: "mlp"}


@dataclass(frozen=True)
class PrunedFamily(Family):
    """`base` with layers that differ.

    Attributes:
        base: The family of transformers'.
    """

    base: Family | None = None

    @property
    def module(self) -> str:
        """The name of the code's module."""
        return f"modeling_{self.model_type}"

    def code(self) -> str:
        """The code: `modeling_pruned.py` for this family's class."""
        assert self.base is not None
        camel, snake = self.base.name.removesuffix("ForCausalLM"), self.base.model_type
        text = _TEMPLATE.read_text(encoding="utf-8")
        return text.replace("Llama", camel).replace('"llama"', f'"{snake}"').replace("pruned_llama", self.model_type)

    def write(self, arch: Architecture, like: Config | None = None) -> dict[str, Any]:
        """`config.json` as `Family.write`; what `like`, a configuration of `base` or of this, says otherwise stays."""
        config = f"{self.name.removesuffix('ForCausalLM')}Config"
        own = {
            "architectures": [self.name], "model_type": self.model_type,
            "auto_map": {"AutoConfig": f"{self.module}.{config}", "AutoModelForCausalLM": f"{self.module}.{self.name}"},
        }  # fmt: skip
        if like and like.get("model_type") == self.model_type:
            return super().write(arch, like)
        return super().write(arch, own | {name: value for name, value in (like or {}).items() if name not in own})

    def _blocks(self, pattern: str) -> list[tuple[int, ...]]:
        return [units for units, _ in blocks(pattern, self.block)]


def holds_our_code(directory: Path, config: Config) -> bool:
    """Whether a directory's class is one of ours, and the code beside it is what we wrote there, unchanged."""
    for variant in VARIANTS:
        code = directory / f"{variant.module}.py"
        if variant.model_type == config.get("model_type") and code.is_file():
            return code.read_text(encoding="utf-8") == variant.code()
    return False


def blocks(pattern: str, block: str) -> list[tuple[tuple[int, ...], str]]:
    """Our sub-layers that make each layer of theirs, and the kinds that the layer lacks.

    Raises:
        CheckpointError: A sub-layer is of a kind that the block does not have.
    """
    if not block:
        return [((unit,), "") for unit in range(len(pattern))]
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
class _PrunedLayers:
    """`pruned_layers`: for each layer, the sub-layers that it lacks and the sizes that are its own.

    Attributes:
        block: The sub-layers of a whole layer, `""` where each is a layer of its own and the family tells the pattern.
        sizes: Their names of our sizes that may differ.
    """

    block: str
    sizes: dict[str, str]

    def read(self, config: Config) -> dict[str, Any]:
        """The pattern, where layers are blocks, and the sizes."""
        entries = config.get(ENTRY)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise CheckpointError(f"config.json has no {ENTRY!r}", legal="a list with an object for each layer")
        sizes = {
            ours: tuple(entry[theirs] for entry in entries if theirs in entry) for ours, theirs in self.sizes.items()
        }
        fields: dict[str, Any] = {"layer_sizes": {name: values for name, values in sizes.items() if values}}
        if self.block:
            kinds = [kind for entry in entries for kind in self.block if _SUBLAYERS[kind] not in entry.get("skip", ())]
            fields["pattern"] = "".join(kinds)
        return fields

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """The entry."""
        entries: list[dict[str, Any]] = []
        for units, lacking in blocks(arch.pattern, self.block):
            entry: dict[str, Any] = {"skip": [_SUBLAYERS[kind] for kind in lacking]} if lacking else {}
            for unit in units:
                for ours, theirs in self.sizes.items():
                    if PER_LAYER[ours] == arch.pattern[unit] and ours in arch.layer_sizes:
                        entry[theirs] = getattr(arch.at(unit), ours)
            entries.append(entry)
        count = {"num_hidden_layers": len(entries)} if self.block else {}
        types = {"layer_types": ["full_attention"] * len(entries)} if self.block and "layer_types" in like else {}
        return {ENTRY: entries, **count, **types}


def pruned(base: Family, **sizes: str) -> PrunedFamily:
    """The variant of a family whose layers may differ.

    Args:
        base: The family.
        **sizes: Its names of our sizes that may differ from layer to layer.
    """
    settings = [setting for setting in base.settings if not isinstance(setting, Layers)]
    fields = {name: getattr(base, name) for name in ("layer", "block", "links", "without", "free")}
    settings.append(_PrunedLayers(base.block, sizes))
    return PrunedFamily(f"Pruned{base.name}", f"pruned_{base.model_type}", settings=settings, base=base, **fields)


VARIANTS = (
    *(pruned(family, ffn_hidden_size="intermediate_size") for family in (LLAMA, MISTRAL, QWEN2, QWEN3, NEMOTRON)),
    pruned(NEMOTRON_H, ffn_hidden_size="intermediate_size", mamba_num_heads="mamba_num_heads"),
)
