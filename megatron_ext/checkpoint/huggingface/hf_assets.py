"""What lies beside the weights of a Hugging Face model: configuration, tokenizer, licence; kept with a converted.

A run that trains keeps its tokenizer too, so that it can be copied, and exported from anywhere.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpoint import checksums, file_checksums, layout
from megatron_ext.checkpoint.atomic import atomic_write
from megatron_ext.errors import CheckpointError
from megatron_ext.untrusted.paths import inside

if TYPE_CHECKING:
    from megatron_ext.checkpoint.writer import CheckpointWriter

FOLDER = "huggingface"
CONFIG = "config.json"
GENERATION = "generation_config.json"
CARD = "README.md"
TOKENIZER = "tokenizer.json"
TOKENIZER_FOLDER = "tokenizer"
_TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".index.json")
_LARGEST = 200 * 2**20  # bytes; a tokenizer is smaller


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a directory.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    path = inside(directory, CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {CONFIG}", got=directory, legal="the directory of a Hugging Face model") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{CONFIG} is not JSON: {error}", got=path) from error
    except OSError as error:
        raise CheckpointError(f"{CONFIG} cannot be read: {error.strerror}", got=path) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{CONFIG} is not an object", got=path)
    return config


def files(directory: Path) -> list[Path]:
    """Everything beside the weights, but the model card and the weights' checksums.

    Raises:
        UntrustedError: One of them is a link that leads out of the directory.
    """
    return [
        inside(directory, path.name)
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS)
        and path.name not in (CARD, checksums.FILE) and path.stat().st_size <= _LARGEST
    ]  # fmt: skip


def check(directory: Path) -> None:
    """Compare everything beside the weights with its checksums, as far as there are any.

    Raises:
        CheckpointError: A file is not what was written, or gone, or there is no directory.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError("this is no directory", got=directory, legal="the directory of a Hugging Face model")
    file_checksums.check_all(directory, _WEIGHTS)


def check_tokenizer(directory: Path) -> None:
    """The same for the files of a tokenizer.

    Raises:
        CheckpointError: One of them is not what was written, or gone.
    """
    for name in _TOKENIZER_FILES:
        file_checksums.check_file(directory / name)


def copy(paths: Iterable[Path], destination: Path) -> None:
    """Copy files into a directory."""
    destination.mkdir(exist_ok=True)
    for path in paths:
        shutil.copyfile(path, destination / path.name)


def attach(writer: "CheckpointWriter", paths: Sequence[Path]) -> None:
    """Keep these files with a checkpoint that is being written, and their checksums."""
    _keep(writer, FOLDER, paths)


def _keep(writer: "CheckpointWriter", name: str, paths: Sequence[Path]) -> None:
    writer.attach(name, lambda folder: copy(paths, folder))
    writer.attach(checksums.FILE, lambda file: file_checksums.add(file.parent, name))


def assets_of(step: Path) -> Path | None:
    """Where a converted checkpoint keeps them: beside its steps; None if it was not converted.

    Raises:
        UntrustedError: It is a link that leads out of the checkpoint.
        CheckpointError: A file in it is not what was written.
    """
    folder = inside(step.parent, FOLDER)
    if not (folder / CONFIG).is_file():
        return None
    file_checksums.check_folder(step.parent, FOLDER)
    return folder


def tokenizer(step: Path) -> Path | None:
    """The directory of the tokenizer that a step was converted or trained with; None if it is not there.

    Raises:
        UntrustedError: It is the checkpoint's own, and a link that leads out of it.
        CheckpointError: It is the checkpoint's own, and not what was written.
    """
    named = trained_with(step)
    for found in (assets_of(step), step.parent / TOKENIZER_FOLDER, Path(named) if named else None):
        if found is not None and (found / TOKENIZER).is_file():
            if found.parent == step.parent:
                for path in tokenizer_files(found):
                    inside(step.parent, f"{found.name}/{path.name}")
                file_checksums.check_folder(step.parent, found.name)
            return found
    return None


def trained_with(step: Path) -> str | None:
    """The path of the tokenizer that a step was trained with, as it was then; None if it was trained without."""
    return getattr(layout.common(step).get("args"), "tokenizer_model", None)


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a tokenizer, of all that lie in a directory."""
    return [path for name in _TOKENIZER_FILES if (path := directory / name).is_file()]


def keep_tokenizer(directory: Path, run: Path) -> None:
    """Keep a tokenizer with a run directory, unless it is there."""
    kept = run / TOKENIZER_FOLDER
    for path in (files := tokenizer_files(directory)):
        kept.mkdir(exist_ok=True)
        if not (kept / path.name).is_file() or (kept / path.name).read_bytes() != path.read_bytes():
            with atomic_write(kept / path.name) as temporary:
                shutil.copyfile(path, temporary)
    if files:
        file_checksums.add(run, TOKENIZER_FOLDER)


def hand_on(step: Path, writer: "CheckpointWriter") -> None:
    """Keep what a step was converted from, or else its tokenizer, with a checkpoint that is made of it."""
    if folder := assets_of(step):
        attach(writer, files(folder))
    elif found := tokenizer(step):
        _keep(writer, TOKENIZER_FOLDER, tokenizer_files(found))


def vocab_size(directory: Path) -> int:
    """Rows that an embedding needs for the tokenizer of a directory: one for the largest number of a token."""
    from tokenizers import Tokenizer

    return max(Tokenizer.from_file(str(directory / TOKENIZER)).get_vocab().values()) + 1


def special_tokens(directory: Path) -> dict[str, int | None]:
    """The entries of `config.json` that say with what a tokenizer begins, ends and pads texts; null for nothing."""
    from tokenizers import Tokenizer

    special: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            special |= json.loads((directory / name).read_text(encoding="utf-8"))
    known = Tokenizer.from_file(str(directory / TOKENIZER))
    ids: dict[str, int | None] = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = special.get(name)
        text = token["content"] if isinstance(token, dict) else token
        ids[f"{name}_id"] = known.token_to_id(text) if text else None
    return ids


def find(path: str | Path) -> Path:
    """The files that a Hugging Face directory, or a checkpoint converted from one, has.

    Raises:
        CheckpointError: It has none.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        return path
    for folder in (path / FOLDER, path.parent / FOLDER):
        if (folder / CONFIG).is_file():
            return folder
    raise CheckpointError(
        f"no {CONFIG}", got=path, legal="a Hugging Face directory, or a checkpoint that was converted from one"
    )


def card(title: str, facts: dict[str, str]) -> str:
    """A model card."""
    lines = [f"# {title}", "", "Converted from a Megatron checkpoint by megatron_ext.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items() if value)]
    return "\n".join(lines) + "\n"


def provenance(step: Path) -> dict[str, str]:
    """Where a checkpoint came from, as far as it says."""
    facts: dict[str, str] = {}
    args = layout.common(step).get("args")
    samples, length = getattr(args, "consumed_train_samples", 0), getattr(args, "seq_length", None)
    if samples and length:
        facts["trained on"] = f"{samples * length:,} tokens in the last run"
    for name in ("distill_teacher", "load", "pretrained_checkpoint"):
        if value := getattr(args, name, None):
            facts[name.replace("_", " ")] = f"`{value}`"
    plan = step.parent / "plan.json"
    if plan.is_file():
        try:
            made_by = json.loads(plan.read_text(encoding="utf-8")).get("provenance", {})
        except (ValueError, AttributeError):
            made_by = {}
        facts["pruned by plan"] = (
            ", ".join(f"{name}={value}" for name, value in made_by.items() if value) or "plan.json"
        )
    return facts
