"""Which families there are, and which one a `config.json` or a model belongs to."""

from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.llama import LLAMA
from megatron_ext.checkpoint.huggingface.mamba2 import MAMBA2
from megatron_ext.checkpoint.huggingface.mistral import MISTRAL
from megatron_ext.checkpoint.huggingface.nemotron import NEMOTRON
from megatron_ext.checkpoint.huggingface.nemotron_h import NEMOTRON_H
from megatron_ext.checkpoint.huggingface.qwen import QWEN2, QWEN3
from megatron_ext.checkpoint.huggingface.state_spaces import STATE_SPACES
from megatron_ext.errors import CheckpointError, ConfigError, nearest
from megatron_ext.models.config import Architecture

FAMILIES = {
    family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, NEMOTRON, MAMBA2, NEMOTRON_H, STATE_SPACES)
}


def named(name: str) -> Family:
    """The family of this class.

    Raises:
        ConfigError: There is none; names the nearest.
    """
    if name not in FAMILIES:
        raise ConfigError(f"no family {name!r}", legal=nearest(name, FAMILIES))
    return FAMILIES[name]


def of_config(config: Config) -> Family:
    """The family that a `config.json` names.

    Raises:
        CheckpointError: It names none of ours.
    """
    names = config.get("architectures") or (["MambaLMHeadModel"] if "ssm_cfg" in config else [])
    if not names:
        names = [family.name for family in FAMILIES.values() if family.model_type == config.get("model_type")]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise CheckpointError(
        "this kind of model is not converted", got=", ".join(names) or config.get("model_type"),
        legal=", ".join(FAMILIES),
    )  # fmt: skip


def expressing(arch: Architecture) -> Family:
    """The first family that can express a model.

    Raises:
        CheckpointError: None can; says why not for each.
    """
    reasons = []
    for family in FAMILIES.values():
        try:
            family.write(arch)
            family.pieces(arch)
            return family
        except CheckpointError as error:
            reasons.append(" ".join(line.strip() for line in str(error).splitlines()))
    raise CheckpointError("no family can express this model:\n    " + "\n    ".join(reasons))
