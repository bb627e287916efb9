"""A directory as transformers' model, with no other code than transformers' and ours."""

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.huggingface import hf_assets
from megatron_ext.checkpoint.huggingface.families import REMOTE_CODE
from megatron_ext.checkpoint.huggingface.remote_code import RemoteCodeFamily
from megatron_ext.errors import CheckpointError, ConfigError, UntrustedError
from megatron_ext.untrusted.paths import inside

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a directory, in evaluation mode.

    transformers sees configuration and weights, and the code that we write for a class of ours: nothing else that lies
    there, whatever `auto_map` or a file's name makes it look for, and whatever is put there meanwhile.

    Raises:
        UntrustedError: The configuration names, or the directory has, other code than ours for a class of ours.
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    config = hf_assets.read_config(directory)
    family = _coded(config)
    if family is not None:
        check_code(directory, config, family)
    with tempfile.TemporaryDirectory() as temporary:
        seen = Path(temporary) / f"verified_{config.get('model_type')}"
        seen.mkdir()
        kept = config if family is not None else {name: value for name, value in config.items() if name != "auto_map"}
        (seen / hf_assets.CONFIG).write_text(json.dumps(kept), encoding="utf-8")
        for path in sorted({path for ending in _WEIGHTS for path in directory.glob(ending)}):
            (seen / path.name).symlink_to(inside(directory, path.name).resolve())
        if family is not None:
            (seen / f"{family.module}.py").write_text(family.code(), encoding="utf-8")
        try:
            return AutoModelForCausalLM.from_pretrained(
                seen, dtype=dtype, trust_remote_code=family is not None, local_files_only=True
            ).eval()
        except Exception as error:  # whatever a class of transformers' raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"transformers cannot load the model: {reason}", got=directory) from error


def load_gguf(file: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a GGUF file as transformers itself reads it, in evaluation mode; nothing beside it is seen.

    Args:
        file: The file.
        folder: The configuration: transformers reads no scaling of frequencies from such files, no biases, and not
            how many channels a head has.
        dtype: The type of the weights.

    Raises:
        ConfigError: A package that transformers needs for it is missing.
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("transformers reads GGUF with accelerate only", legal="pip install 'megatron-ext[gguf]'")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    try:
        with tempfile.TemporaryDirectory() as seen:
            (Path(seen) / file.name).symlink_to(file.resolve())
            return AutoModelForCausalLM.from_pretrained(
                seen, gguf_file=file.name, dtype=dtype, local_files_only=True, config=config, trust_remote_code=False
            ).eval()
    except Exception as error:  # whatever a class of transformers' raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"transformers cannot load the model: {reason}", got=file) from error


def check_code(directory: Path, config: dict[str, Any], family: RemoteCodeFamily) -> None:
    """Check that a directory's class is one of ours by name, and its code what we write, byte for byte.

    Raises:
        UntrustedError: It is not.
    """
    for name, expected in family.entries().items():
        if config.get(name) != expected:
            raise UntrustedError(
                f"config.json: {name!r} names other code than ours", got=config.get(name), legal=expected
            )
    code = inside(directory, f"{family.module}.py")
    if not code.is_file() or code.read_bytes() != family.code().encode():
        raise UntrustedError(
            "the code beside the weights is not what is written here, and is not run", got=code,
            legal=f"the {code.name} that `megatron-ext convert --to hf` writes",
        )  # fmt: skip


def _coded(config: dict[str, Any]) -> RemoteCodeFamily | None:
    """The class of ours that a configuration asks for, by any of its names."""
    names = [config.get("model_type"), *(config.get("architectures") or [])]
    return next((family for family in REMOTE_CODE if family.model_type in names or family.name in names), None)
