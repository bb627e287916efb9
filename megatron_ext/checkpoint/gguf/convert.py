"""`--to gguf`: a checkpoint as one file that llama.cpp and what is built on it run."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint import ranks, stream
from megatron_ext.checkpoint.atomic import refuse_existing, shared_directory
from megatron_ext.checkpoint.file_checksums import write_rest
from megatron_ext.checkpoint.gguf import architectures
from megatron_ext.checkpoint.gguf.architectures import GgufArchitecture
from megatron_ext.checkpoint.gguf.entries import ROPE_FREQUENCIES, Described, llama3_factors
from megatron_ext.checkpoint.gguf.file import GgufTensor
from megatron_ext.checkpoint.gguf.forms import ALWAYS_FP32
from megatron_ext.checkpoint.gguf.layer_sizes import DECI, of_tensors, zero_tensors
from megatron_ext.checkpoint.gguf.tokenizer import NO_TOKENIZER
from megatron_ext.checkpoint.gguf.tokenizer_metadata import tokenizer_metadata
from megatron_ext.checkpoint.gguf.writer import GgufTarget, writing
from megatron_ext.checkpoint.huggingface import families, hf_assets
from megatron_ext.checkpoint.huggingface.convert import Export, planned
from megatron_ext.checkpoint.huggingface.family import functional_fields
from megatron_ext.checkpoint.stream import Progress, silent
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture

KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""Types that are asked for, and GGUF's names of them."""
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # llama.cpp's `llama_ftype`
_BLOCK = 32  # values of a block of Q8_0


def to_gguf(
    source: str | Path,
    destination: str | Path,
    *,
    kind: str | None = None,
    like: str | Path | None = None,
    family: str | None = None,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    progress: Progress = silent,
) -> Path:
    """Convert a checkpoint of a `HybridModel` into a directory with a GGUF file.

    Args:
        source: A checkpoint directory, or a step in it.
        destination: A new directory.
        kind: The type of matrices, of `KINDS`; the one they have by default. Vectors stay in fp32, and in Q8_0
            matrices whose rows are no whole blocks become F16, as llama.cpp has it.
        like: See `to_hf`, as the others.
        family: The class it is to be.
        tokenizer: The directory of a tokenizer.
        vocab_size: Words without padding.
        progress: Called with the bytes written, and those to write in all.

    Returns:
        The file.

    Raises:
        CheckpointError: The source is missing or damaged, llama.cpp cannot run the model, a value does not fit, or the
            destination exists.
        ConfigError: The tokenizer is not there, or llama.cpp does not know its like; the `gguf` package is missing.
    """
    destination = Path(destination)
    refuse_existing(destination)
    export = planned(source, like, family, tokenizer, vocab_size, None)
    architecture = architectures.of_model(export.arch, export.family)
    config = export.family.write(export.arch)
    own = KINDS[str(export.dtype).removeprefix("torch.")] if kind is None else KINDS[kind]
    metadata = _general(destination.name, own) | architecture.metadata(config)
    metadata[f"{architecture.name}.vocab_size"] = export.arch.padded_vocab_size
    if (folder := export.replacement or export.folder) and (folder / hf_assets.TOKENIZER).is_file():
        metadata |= tokenizer_metadata(folder, export.arch.padded_vocab_size)
    else:
        metadata["tokenizer.ggml.model"] = NO_TOKENIZER
    targets = _targets(export, architecture, metadata[f"{architecture.name}.block_count"], own)
    _check(export, architecture, metadata, targets)
    extras = _extras(config)
    targets |= {name: GgufTarget(name, "F32", tuple(tensor.shape), lambda each: each)
                for name, tensor in extras.items()}  # fmt: skip
    with shared_directory(destination) as directory:
        path = directory / f"{destination.name}-{own}.gguf"
        with writing(path, architecture.name, metadata, targets) as writer:
            stream.run(export.moves, export.reader, writer, progress)
            for name, tensor in extras.items():
                if ranks.rank() == 0:
                    writer.write(name, tensor)
        if ranks.rank() == 0:
            facts = export.facts() | {"architecture": f"{architecture.name} (llama.cpp)", "type": own}
            (directory / hf_assets.CARD).write_text(hf_assets.card(destination.name, facts), encoding="utf-8")
            write_rest(directory, but=[hf_assets.CARD])
    return destination / path.name


def _check(
    export: Export, architecture: GgufArchitecture, metadata: Mapping[str, Any], targets: Mapping[str, GgufTarget]
) -> None:
    """Check that what a reader would make of the file is the model, but for Llama 3.1's factors, which are a tensor.

    Raises:
        CheckpointError: llama.cpp's architecture has no word for something; names it.
    """
    tensors = {each.name: GgufTensor(each.shape, each.kind, Path(), 0, 0) for each in targets.values()}
    given = Described(Path(), {"general.architecture": architecture.name, **metadata}, tensors)
    if architecture.name == DECI:
        given = of_tensors(given)
    config = architecture.config(given)
    family = families.of_config(config)
    scaling = export.arch.rope_scaling
    plain = {"rope_scaling_factor": None, "rope_scaling": {} if scaling.get("rope_type") == "llama3" else scaling}
    wanted = functional_fields(replace(export.arch, **plain))
    read = functional_fields(family.read(config))
    lost = [name for name, value in wanted.items() if read.get(name) != value and name not in family.ignored_fields]
    if lost:
        raise CheckpointError(
            f"llama.cpp cannot run this model: its {architecture.name!r} has no word for {lost[0]}",
            got=", ".join(f"{name}={wanted[name]!r}" for name in lost)[:300],
        )  # fmt: skip


def _general(name: str, kind: str) -> dict[str, Any]:
    return {
        "general.type": "model", "general.name": name, "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
    }  # fmt: skip


def _targets(export: Export, architecture: GgufArchitecture, layers: int, kind: str) -> dict[str, GgufTarget]:
    """Each tensor of the export in GGUF's words, by Hugging Face's name."""
    names = architecture.names(list(export.targets), layers)
    found = {}
    for hf, entry in export.targets.items():
        form = partial(_to_gguf, architecture, export.arch, hf)
        shape = tuple(form(torch.empty(entry.shape, device="meta")).shape)
        exact = len(shape) == 1 or names[hf].endswith(ALWAYS_FP32)
        own = "F16" if kind == "Q8_0" and shape[-1] % _BLOCK else kind
        found[hf] = GgufTarget(names[hf], "F32" if exact else own, shape, form)
    return found


def _to_gguf(architecture: GgufArchitecture, arch: Architecture, hf: str, tensor: Tensor) -> Tensor:
    return architecture.form(hf).to_gguf(arch, tensor)


def _extras(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors that llama.cpp wants, and that are no weights: factors of frequencies, parts of zeros."""
    found = {name: torch.zeros(shape) for name, shape in zero_tensors(config).items()}
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        base, channels = config["rope_theta"], config["head_dim"]
        found[ROPE_FREQUENCIES] = llama3_factors(base, channels, scaling["factor"], scaling)
    return found
