"""The stream between the two formats, tensor by tensor. No model is built; memory holds a tensor and its source."""

import importlib.metadata
import json
from argparse import Namespace
from dataclasses import replace
from functools import partial, reduce
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint import layout, ranks, stream
from megatron_ext.checkpoint.atomic import refuse_existing, shared_directory
from megatron_ext.checkpoint.blocks import ReusableBuffer, TensorEntry
from megatron_ext.checkpoint.checksums import write_rest
from megatron_ext.checkpoint.huggingface import companions, families
from megatron_ext.checkpoint.huggingface.coded import CodedFamily
from megatron_ext.checkpoint.huggingface.family import Family, Piece, their_shape
from megatron_ext.checkpoint.huggingface.pickled import Pickled
from megatron_ext.checkpoint.huggingface.selection import weights_of
from megatron_ext.checkpoint.huggingface.shards import SHARD_BYTES, Shards, writing_shards
from megatron_ext.checkpoint.reader import Reader
from megatron_ext.checkpoint.stream import Move, Part, Progress, silent
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
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    vocab_multiple: int = 1,
    progress: Progress = silent,
) -> Architecture:
    """Convert a Hugging Face directory into a checkpoint of a `HybridModel`, for any parallel layout.

    Configuration, tokenizer and the like are kept beside the weights, in a folder of their own.

    Args:
        source: A directory with `config.json` and safetensors.
        destination: A new directory.
        dtype: The type of the weights; the one they have by default.
        vocab_multiple: Zero rows are added to the vocabulary up to a multiple of this.
        progress: Called with the bytes written, and those to write in all.

    Returns:
        The model.

    Raises:
        CheckpointError: The source is missing, damaged or of a kind that is not converted, or the destination exists.
    """
    source, destination = Path(source), Path(destination)
    refuse_existing(destination)
    config = companions.read_config(source)
    family = families.of_config(config)
    told = family.read(config)
    arch = replace(told, vocab_size=-(-told.vocab_size // vocab_multiple) * vocab_multiple)
    pieces = family.pieces(told)
    shards = weights_of(source, config)
    _check_theirs(family, told, pieces, shards)
    shapes = axes.tensors(arch)
    types = {piece.ours: _type(piece.ours, shards.entries[piece.theirs].dtype, dtype) for piece in pieces}
    moves: list[Move] = []
    for key, own in groupby(pieces, key=lambda piece: piece.ours):
        parts = tuple(Part(piece.theirs, (piece.first, piece.stop), place=piece.view) for piece in own)
        padding = shapes[key][0] - axes.shape(told, key)[0]
        moves.append(Move(key, TensorEntry(shapes[key], types[key]), parts, padding))
    args = Namespace(params_dtype=dtype or types[axes.EMBEDDING], vocab_size=None)
    with writing(destination, arch, args) as writer:
        companions.attach(writer, companions.files(source))
        stream.run(moves, shards, writer, progress)
    return arch


def _type(key: str, own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return own if wanted is None or key.endswith(_EXACT) else wanted


def _their_shapes(arch: Architecture, pieces: list[Piece]) -> dict[str, tuple[int, ...]]:
    """All tensors of theirs."""
    ours = {key: torch.empty(shape, device="meta") for key, shape in axes.tensors(arch).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        rest = their_shape(piece.view(ours[piece.ours]), ours[piece.ours].dim())[1:]
        rows = max(piece.stop, shapes.get(piece.theirs, (0,))[0])
        shapes[piece.theirs] = (rows, *rest)
    return shapes


def _check_theirs(family: Family, arch: Architecture, pieces: list[Piece], shards: Shards | Pickled) -> None:
    """Check that a directory holds exactly the tensors of a model, and parts of one weight in one type.

    Raises:
        CheckpointError: Names the first few that are missing, too many, or of another shape or type.
    """
    expected, held = _their_shapes(arch, pieces), shards.entries
    spare = [name for name in held if name not in expected and not name.endswith(family.without)]
    tied = not arch.untie_embeddings_and_output_weights
    if tied and spare == ["lm_head.weight"]:  # written by some, read by none
        spare = (
            [] if _same_values(shards, "lm_head.weight", pieces[0].theirs) else ["lm_head.weight (embeddings are tied)"]
        )
    wrong = [f"{name} is missing" for name in expected if name not in held]
    wrong += [f"{name} is not part of the model" for name in spare]
    wrong += [
        f"{name} is {held[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in held and held[name].shape != shape
    ]
    types: dict[str, torch.dtype] = {}
    for piece in pieces:
        if piece.theirs in held and types.setdefault(piece.ours, held[piece.theirs].dtype) != held[piece.theirs].dtype:
            wrong.append(f"{piece.theirs} is {held[piece.theirs].dtype}, the rest of its layer's {types[piece.ours]}")
    wrong += [
        f"{name} is {held[name].dtype}" for name in expected if name in held and not held[name].dtype.is_floating_point
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"the tensors are not those of the {family.name} that config.json describes",
            got="; ".join(wrong[:3]) + more,
        )


def _same_values(shards: Shards | Pickled, left: str, right: str) -> bool:
    a, b = shards.entries[left], shards.entries.get(right)
    if b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows = max(1, 2**24 // (a.shape[1] * a.dtype.itemsize))
    mine, other = ReusableBuffer(), ReusableBuffer()
    for first in range(0, a.shape[0], rows):
        shape = (min(rows, a.shape[0] - first), *a.shape[1:])
        one, two = mine.tensor(shape, a.dtype), other.tensor(shape, a.dtype)
        shards.fill(left, one, (first, first + shape[0]))
        shards.fill(right, two, (first, first + shape[0]))
        if not torch.equal(one.view(torch.uint8), two.view(torch.uint8)):
            return False
    return True


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
    reader = Reader(source)
    arch = layout.architecture(reader.step.path)
    check_shapes(arch, reader.shapes)
    folder = companions.find(like) if like is not None else companions.beside(reader.step.path)
    config = original = companions.read_config(folder) if folder else {}
    words = _tokenizer(reader.step.path, tokenizer, folder, vocab_size)
    arch = replace(arch, vocab_size=_words(arch, {} if tokenizer else config, words, vocab_size))
    chosen = _family(arch, config, family)
    if config and families.of_config(config) not in (chosen, getattr(chosen, "base", None)):
        config = {}
    types = {key: dtype_ for key, (_, dtype_) in layout.tensors(reader.step.path).items()}
    written = chosen.write(arch, config)
    written = _with_type(written, config, _type(axes.EMBEDDING, types[axes.EMBEDDING], dtype))
    special = companions.special_tokens(words) if words else {name: original.get(name) for name in SPECIAL_TOKENS}
    if words or not config:
        written = written | special
    pieces = chosen.pieces(arch)
    sources: dict[str, list[Piece]] = {}
    for piece in pieces:
        sources.setdefault(piece.theirs, []).append(piece)
    targets: dict[str, TensorEntry] = {}
    moves: list[Move] = []
    for name, shape in _their_shapes(arch, pieces).items():
        held = reduce(torch.promote_types, (types[piece.ours] for piece in sources[name]))
        targets[name] = TensorEntry(shape, _type(name, held, dtype))
        parts = tuple(_part(piece, reader.entries[piece.ours], shape[0]) for piece in sources[name])
        moves.append(Move(name, targets[name], parts))
    with shared_directory(destination) as directory:
        with writing_shards(directory, targets, shard_bytes) as writer:
            stream.run(moves, reader, writer, progress)
        if ranks.rank() == 0:
            _write_files(directory, folder, words, special)
            if written != config:
                (directory / companions.CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
            if isinstance(chosen, CodedFamily):
                (directory / f"{chosen.module}.py").write_text(chosen.code(), encoding="utf-8")
            facts = _facts(arch, chosen) | companions.provenance(reader.step.path)
            (directory / companions.CARD).write_text(companions.card(destination.name, facts), encoding="utf-8")
            write_rest(directory, but=[companions.CARD])
    return chosen


def _part(piece: Piece, entry: TensorEntry, rows: int) -> Part:
    """What a weight of ours contributes to a tensor of theirs with so many rows."""
    ours = torch.empty(entry.shape, device="meta")
    seen = piece.view(ours)
    whole = seen.is_contiguous() and seen.numel() == ours.numel()
    place = None if (piece.first, piece.stop) == (0, rows) else partial(_rows, first=piece.first, stop=piece.stop)
    return Part(piece.ours, view=None if whole else piece.view, place=place)


def _rows(tensor: Tensor, first: int, stop: int) -> Tensor:
    return tensor[first:stop]


def _write_files(directory: Path, folder: Path | None, words: Path | None, special: dict[str, int | None]) -> None:
    """Copy what lies in `folder`, with the tokenizer of the directory `words` in place of its own."""
    if folder:
        kept = companions.files(folder)
        others = set(companions.tokenizer_files(folder)) if words else set()
        companions.copy([path for path in kept if path not in others], directory)
    if words:
        companions.copy(companions.tokenizer_files(words), directory)
        generation = json.dumps({name: number for name, number in special.items() if number is not None}, indent=2)
        (directory / companions.GENERATION).write_text(generation + "\n", encoding="utf-8")


def _tokenizer(step: Path, given: str | Path | None, folder: Path | None, wanted: int | None) -> Path | None:
    """The tokenizer to write in place of the folder's, if any."""
    if given is not None:
        if not (Path(given) / companions.TOKENIZER).is_file():
            raise ConfigError("--tokenizer: no such tokenizer", got=given, legal=f"a place of {companions.TOKENIZER}")
        check_tokenizer(step, Path(given), "the model")
        return Path(given)
    if folder is not None:
        return None
    found = companions.tokenizer(step)
    if found is None and wanted is None and (named := companions.trained_with(step)):
        raise ConfigError(
            "the tokenizer that the model was trained with is not there", got=named,
            legal=f"--tokenizer DIR, with {companions.TOKENIZER}; or --vocab-size N, which writes none",
        )  # fmt: skip
    return found


def _words(arch: Architecture, config: dict[str, Any], tokenizer: Path | None, wanted: int | None) -> int:
    if wanted is not None and not 1 <= wanted <= arch.vocab_size:
        raise ConfigError("--vocab-size: the embedding has other rows", got=wanted, legal=f"1 to {arch.vocab_size}")
    told = arch.vocab_size
    if config:
        try:
            told = families.of_config(config).read(config).vocab_size
        except CheckpointError:
            told = int(config.get("vocab_size", told))
    elif tokenizer:
        told = companions.words(tokenizer)
        if told > arch.vocab_size:
            raise ConfigError("the tokenizer has more words than the model", got=told, legal=f"up to {arch.vocab_size}")
    return min(wanted or told, arch.vocab_size)


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
        "class": family.name + (" (`trust_remote_code=True`)" if isinstance(family, CodedFamily) else ""),
        "parameters": f"{arch.num_parameters():,}", "layers": f"`{arch.pattern}`",
        "hidden size": f"{arch.hidden_size:,}", "versions": versions,
    }  # fmt: skip
