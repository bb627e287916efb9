"""Which families there are, and which one a `config.json` or a model belongs to."""

from megatron_ext.checkpoint.huggingface.bamba import BAMBA
from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.gemma import GEMMA, GEMMA2, GEMMA3
from megatron_ext.checkpoint.huggingface.glm import GLM, GLM4
from megatron_ext.checkpoint.huggingface.granite import GRANITE
from megatron_ext.checkpoint.huggingface.hybrid import HYBRID
from megatron_ext.checkpoint.huggingface.llama import LLAMA
from megatron_ext.checkpoint.huggingface.mamba2 import MAMBA2
from megatron_ext.checkpoint.huggingface.mistral import MISTRAL
from megatron_ext.checkpoint.huggingface.mixtures import MIXTRAL, QWEN3_MOE
from megatron_ext.checkpoint.huggingface.nemotron import NEMOTRON
from megatron_ext.checkpoint.huggingface.nemotron_h import NEMOTRON_H
from megatron_ext.checkpoint.huggingface.olmo2 import OLMO2
from megatron_ext.checkpoint.huggingface.phi3 import PHI3
from megatron_ext.checkpoint.huggingface.pruned import PRUNED
from megatron_ext.checkpoint.huggingface.qwen import QWEN2, QWEN3
from megatron_ext.checkpoint.huggingface.state_spaces import STATE_SPACES
from megatron_ext.errors import CheckpointError, ConfigError, nearest
from megatron_ext.models.architecture import Architecture

_NATIVE = (
    LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GRANITE, GLM, GLM4, OLMO2, GEMMA, GEMMA2, GEMMA3, MIXTRAL, QWEN3_MOE,
    NEMOTRON, BAMBA, MAMBA2, NEMOTRON_H, STATE_SPACES,
)  # fmt: skip
REMOTE_CODE = (*PRUNED, HYBRID)
FAMILIES = {family.name: family for family in (*_NATIVE, *REMOTE_CODE)}


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
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError("config.json: 'architectures' is no list of names", got=repr(names))
    names = names or (["MambaLMHeadModel"] if "ssm_cfg" in config else [])
    if not names:
        names = [family.name for family in FAMILIES.values() if family.model_type == config.get("model_type")]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise CheckpointError(
        "this kind of model is not converted", got=", ".join(names) or config.get("model_type"),
        legal=", ".join(FAMILIES),
    )  # fmt: skip


def like(config: Config, arch: Architecture) -> Family:
    """The family that a `config.json` names, or the one of our own that takes over if only that can be the model.

    Raises:
        CheckpointError: The configuration names no family of ours, or neither can express the model; says why.
    """
    family = of_config(config)
    try:
        return _able(family, arch, config)
    except CheckpointError:
        remote = next((remote for remote in REMOTE_CODE if remote.base is family), None)
        if remote is None:
            raise
        return _able(remote, arch, config)


def expressing(arch: Architecture) -> Family:
    """The first family that can express a model, those of transformers' before their variants.

    Raises:
        CheckpointError: None can; says why not for each.
    """
    reasons = []
    for family in FAMILIES.values():
        try:
            return _able(family, arch, {})
        except CheckpointError as error:
            reasons.append(" ".join(line.strip() for line in str(error).splitlines()))
    raise CheckpointError("no family can express this model:\n    " + "\n    ".join(reasons))


def _able(family: Family, arch: Architecture, config: Config) -> Family:
    family.write(arch, config)
    family.bind(arch)
    return family
