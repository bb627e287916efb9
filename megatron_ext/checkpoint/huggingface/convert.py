"""Conversion between the two formats: compiles the table of tensor moves. No model is built."""

import importlib.metadata
import json
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint import layout, ranks, stream
from megatron_ext.checkpoint.atomic import refuse_existing, shared_directory
from megatron_ext.checkpoint.blocks import TensorEntry
from megatron_ext.checkpoint.file_checksums import write_rest
from megatron_ext.checkpoint.huggingface import families, hf_assets, quantized
from megatron_ext.checkpoint.huggingface.family import Family
from megatron_ext.checkpoint.huggingface.mappings import BoundMapping, hf_shapes
from megatron_ext.checkpoint.huggingface.remote_code import RemoteCodeFamily
from megatron_ext.checkpoint.huggingface.shards import SHARD_BYTES, writing_shards
from megatron_ext.checkpoint.huggingface.weights import HFModel, check_tensors, of_directory
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.stream import Move, Progress, silent
from megatron_ext.checkpoint.tokenizer import check as check_tokenizer
from megatron_ext.checkpoint.writer import check_shapes, writing
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Without these in config.json, transformers takes numbers of its own, which are other tokens.
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What a recurrence or a router multiplies up stays in the type it has.
_EXACT = ("A_log", ".D", "dt_bias", "expert_bias", "e_score_correction_bias")


def to_megatron(
    source: str | Path | HFModel,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    vocab_multiple: int = 1,
    progress: Progress = silent,
) -> Architecture:
    """Convert a Hugging Face directory into a checkpoint of a `HybridModel`, for any parallel layout.

    Configuration, tokenizer and the like are kept beside the weights, in a folder of their own.

    Args:
        source: A directory with `config.json` and safetensors, or a model that lies elsewhere.
        destination: A new directory.
        dtype: The type of the weights; the one they have by default.
        vocab_multiple: Zero rows are added to the vocabulary up to a multiple of this.
        progress: Called with the bytes written, and those to write in all.

    Returns:
        The model.

    Raises:
        CheckpointError: The source is missing, damaged or of a kind that is not converted, or the destination exists.
    """
    destination = Path(destination)
    refuse_existing(destination)
    model = source if isinstance(source, HFModel) else of_directory(Path(source))
    config, weights = model.config, model.weights
    family = families.of_config(config)
    unpadded = family.read(config)
    arch = replace(unpadded, padded_vocab_size=-(-unpadded.padded_vocab_size // vocab_multiple) * vocab_multiple)
    mappings = family.bind(unpadded)
    check_tensors(family, unpadded, mappings, weights)
    shapes = axes.tensors(arch)
    types = {
        mapping.megatron: _type(mapping.megatron, weights.entries[mapping.hf].dtype, dtype) for mapping in mappings
    }
    moves: list[Move] = []
    for key, own in groupby(mappings, key=lambda mapping: mapping.megatron):
        padding = shapes[key][0] - axes.shape(unpadded, key)[0]
        parts = tuple(mapping.from_hf() for mapping in own)
        moves.append(Move(key, TensorEntry(shapes[key], types[key]), parts, padding))
    vocab_size = config.get("vocab_size", unpadded.padded_vocab_size)
    args = Namespace(params_dtype=dtype or types[axes.EMBEDDING], vocab_size=vocab_size)
    with writing(destination, arch, args) as writer:
        hf_assets.attach(writer, hf_assets.files(model.folder))
        stream.run(moves, weights, writer, progress)
    return arch


def _type(key: str, own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return own if wanted is None or key.endswith(_EXACT) else wanted


def to_hf(
    source: str | Path,
    destination: str | Path,
    *,
    like: str | Path | None = None,
    family: str | None = None,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Family:
    """Convert a checkpoint of a `HybridModel` into a directory that transformers loads.

    Args:
        source: A checkpoint directory (then its newest complete step), or a step in it.
        destination: A new directory.
        like: Where configuration and tokenizer come from, a Hugging Face directory or a checkpoint converted from one;
            by default what was kept beside the checkpoint, or else the tokenizer it was trained with.
        family: The class it is to be; by default that of `like`, or the first that can express the model.
        tokenizer: The directory of a tokenizer, in place of that one.
        vocab_size: Words without padding; by default those of `like` or of that tokenizer.
        dtype: The type of the weights; the one they have by default.
        shard_bytes: Bytes of a file.
        progress: Called with the bytes written, and those to write in all.

    Returns:
        The family.

    Raises:
        CheckpointError: The source is missing or damaged, the family cannot express it, or the destination exists.
        ConfigError: The tokenizer is not there, is another, or has more words than the model; the vocabulary is said
            wrongly.
    """
    destination = Path(destination)
    refuse_existing(destination)
    export = planned(source, like, family, tokenizer, vocab_size, dtype)
    chosen, config = export.family, export.like
    written = _with_type(export.written, config, _type(axes.EMBEDDING, export.dtype, dtype))
    if export.replacement or not config:
        written = written | export.special
    with shared_directory(destination) as directory:
        with writing_shards(directory, export.targets, shard_bytes) as writer:
            stream.run(export.moves, export.reader, writer, progress)
        if ranks.rank() == 0:
            _write_files(directory, export.folder, export.replacement, export.special)
            if written != (hf_assets.read_config(export.folder) if export.folder else {}):
                (directory / hf_assets.CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
            if isinstance(chosen, RemoteCodeFamily):
                (directory / f"{chosen.module}.py").write_text(chosen.code(), encoding="utf-8")
            (directory / hf_assets.CARD).write_text(hf_assets.card(destination.name, export.facts()), encoding="utf-8")
            write_rest(directory, but=[hf_assets.CARD])
    return chosen


@dataclass(frozen=True)
class Export:
    """What is to become of a checkpoint: its tensors under Hugging Face's names, and what goes with them.

    Attributes:
        reader: The checkpoint.
        arch: The model without padding in its vocabulary.
        family: What it is to be.
        like: The `config.json` that it was, if it is still of that family.
        written: The one that it is to have, but for type and special tokens.
        folder: What lies beside its weights.
        replacement: The directory of the tokenizer that takes the place of the folder's, if any.
        special: With what that tokenizer begins, ends and pads texts.
        dtype: The type of the embedding.
        targets: The tensors.
        moves: Where they come from.
    """

    reader: CheckpointReader
    arch: Architecture
    family: Family
    like: dict[str, Any]
    written: dict[str, Any]
    folder: Path | None
    replacement: Path | None
    special: dict[str, int | None]
    dtype: torch.dtype
    targets: dict[str, TensorEntry]
    moves: list[Move]

    def facts(self) -> dict[str, str]:
        """What a model card says."""
        return _facts(self.arch, self.family) | hf_assets.provenance(self.reader.step.path)


def planned(
    source: str | Path, like: str | Path | None, family: str | None, tokenizer: str | Path | None,
    vocab_size: int | None, dtype: torch.dtype | None,
) -> Export:  # fmt: skip
    """Find out what is to become of a checkpoint; see `to_hf`."""
    reader = CheckpointReader(source)
    arch = layout.architecture(reader.step.path)
    check_shapes(arch, reader.shapes)
    folder = hf_assets.find(like) if like is not None else hf_assets.assets_of(reader.step.path)
    config = original = quantized.without(hf_assets.read_config(folder)) if folder else {}
    replacement = _tokenizer(reader.step.path, tokenizer, folder, vocab_size)
    vocab_size = _vocab_size(arch, {} if tokenizer else config, replacement, vocab_size)
    arch = replace(arch, padded_vocab_size=vocab_size)  # a directory of transformers' has no padding
    chosen = _family(arch, config, family)
    if config and families.of_config(config) not in (chosen, getattr(chosen, "base", None)):
        config = {}
    written = chosen.write(arch, config)
    types = {key: dtype_ for key, (_, dtype_) in layout.tensors(reader.step.path).items()}
    special = (
        hf_assets.special_tokens(replacement) if replacement else {name: original.get(name) for name in SPECIAL_TOKENS}
    )
    sources: dict[str, list[BoundMapping]] = {}
    for mapping in (mappings := chosen.bind(arch)):
        sources.setdefault(mapping.hf, []).append(mapping)
    targets: dict[str, TensorEntry] = {}
    moves: list[Move] = []
    for name, shape in hf_shapes(arch, mappings).items():
        widest = reduce(torch.promote_types, (types[mapping.megatron] for mapping in sources[name]))
        targets[name] = TensorEntry(shape, _type(name, widest, dtype))
        parts = tuple(mapping.to_hf(reader.entries[mapping.megatron], shape[0]) for mapping in sources[name])
        moves.append(Move(name, targets[name], parts))
    embedding = types[axes.EMBEDDING]
    return Export(reader, arch, chosen, config, written, folder, replacement, special, embedding, targets, moves)


def _write_files(directory: Path, folder: Path | None, tokenizer: Path | None, special: dict[str, int | None]) -> None:
    """Copy what lies in `folder`, with the tokenizer of a directory, if one is given, in place of its own."""
    if folder:
        kept = hf_assets.files(folder)
        others = set(hf_assets.tokenizer_files(folder)) if tokenizer else set()
        hf_assets.copy([path for path in kept if path not in others], directory)
    if tokenizer:
        hf_assets.copy(hf_assets.tokenizer_files(tokenizer), directory)
        generation = json.dumps({name: number for name, number in special.items() if number is not None}, indent=2)
        (directory / hf_assets.GENERATION).write_text(generation + "\n", encoding="utf-8")


def _tokenizer(step: Path, given: str | Path | None, folder: Path | None, wanted: int | None) -> Path | None:
    """The tokenizer to write in place of the folder's, if any."""
    if given is not None:
        if not (Path(given) / hf_assets.TOKENIZER).is_file():
            raise ConfigError("--tokenizer: no such tokenizer", got=given, legal=f"a place of {hf_assets.TOKENIZER}")
        check_tokenizer(step, Path(given), "the model")
        return Path(given)
    if folder is not None:
        return None
    found = hf_assets.tokenizer(step)
    if found is None and wanted is None and (named := hf_assets.trained_with(step)):
        raise ConfigError(
            "the tokenizer that the model was trained with is not there", got=named,
            legal=f"--tokenizer DIR, with {hf_assets.TOKENIZER}; or --vocab-size N, which writes none",
        )  # fmt: skip
    return found


def _vocab_size(arch: Architecture, config: dict[str, Any], tokenizer: Path | None, wanted: int | None) -> int:
    """Entries of the vocabulary: as asked for, or what the configuration or the tokenizer says, or all rows."""
    rows = arch.padded_vocab_size
    if wanted is not None and not 1 <= wanted <= rows:
        raise ConfigError("--vocab-size: the embedding has other rows", got=wanted, legal=f"1 to {rows}")
    known = rows
    if config:
        try:
            known = families.of_config(config).read(config).padded_vocab_size
        except CheckpointError:
            known = int(config.get("vocab_size", rows))
    elif tokenizer:
        known = hf_assets.vocab_size(tokenizer)
        if known > rows:
            raise ConfigError("the tokenizer has more words than the model", got=known, legal=f"up to {rows}")
    return min(wanted or known, rows)


def _family(arch: Architecture, config: dict[str, Any], name: str | None) -> Family:
    if name is not None:
        return families.named(name)
    return families.like(config, arch) if config else families.expressing(arch)


def _with_type(written: dict[str, Any], config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The configuration with the type of the weights; as it was if that says so already, or says nothing."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    name = str(dtype).removeprefix("torch.")
    if written.get(key) == name or (config and key not in config):
        return written
    return written | {key: name}


def _facts(arch: Architecture, family: Family) -> dict[str, str]:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("megatron-ext", "megatron-core", "torch")
    )
    return {
        "class": family.name + (" (`trust_remote_code=True`)" if isinstance(family, RemoteCodeFamily) else ""),
        "parameters": f"{arch.num_parameters():,}", "layers": f"`{arch.pattern}`",
        "hidden size": f"{arch.hidden_size:,}", "versions": versions,
    }  # fmt: skip
