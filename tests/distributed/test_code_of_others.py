"""Directories of Hugging Face whose code, or what names it, is not ours: none of it runs when they are verified."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import make, tokens
from random_models import random_weights

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.huggingface import hf_assets, transformers_model
from megatron_ext.checkpoint.huggingface.convert import to_hf, to_megatron
from megatron_ext.checkpoint.writer import writing
from megatron_ext.errors import CheckpointError, DataError, UntrustedError
from megatron_ext.inference.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
MODULE = "modeling_pruned_qwen3"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `whole`, a model of transformers, and `cut`, one with code of ours."""
    path = tmp_path_factory.mktemp("models")
    make("qwen3", path / "whole")
    to_megatron(path / "whole", path / "megatron")
    arch = replace(layout.architecture(layout.find(path / "megatron").path), pattern="*-*")
    with writing(path / "pruned", arch) as writer:
        hf_assets.attach(writer, hf_assets.files(path / "whole"))
        for key, weight in random_weights(arch).items():
            writer.write(key, weight)
    to_hf(path / "pruned", path / "cut")
    return path


@pytest.fixture
def cut(models: Path, tmp_path: Path) -> Path:
    """The model with code of ours, in a directory of its own, with code of others that says so when it runs."""
    copy = Path(shutil.copytree(models / "cut", tmp_path / "cut"))
    (copy / "custom_generate").mkdir()
    hit = f"open({str(tmp_path / 'hit')!r}, 'w').close()\n"
    ours = (copy / f"{MODULE}.py").read_text()
    for name in ("evil.py", "__init__.py", "transformers.py", "custom_generate/generate.py"):
        (copy / name).write_text(hit + ours + "\ndef generate(*args, **kwargs): ...\n")
    return copy


def edit(directory: Path, **entries: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def names(module: str) -> dict[str, Any]:
    entries = {"AutoConfig": "PrunedQwen3Config", "AutoModelForCausalLM": "PrunedQwen3ForCausalLM"}
    return {"auto_map": {auto: f"{module}.{name}" for auto, name in entries.items()}}


def other_module(cut: Path) -> None:
    edit(cut, **names("evil"))


def other_configuration(cut: Path) -> None:
    edit(cut, auto_map=names(MODULE)["auto_map"] | {"AutoConfig": "evil.PrunedQwen3Config"})


def other_repository(cut: Path) -> None:
    edit(cut, **names(f"somebody/else--{MODULE}"))


def one_more(cut: Path) -> None:
    edit(cut, auto_map=names(MODULE)["auto_map"] | {"AutoTokenizer": ["evil.Tokenizer", None]})


def other_type(cut: Path) -> None:
    edit(cut, model_type="evil", **names("evil"))


def changed(cut: Path) -> None:
    code = cut / f"{MODULE}.py"
    code.write_text(code.read_text() + "\nfrom . import evil\n")


def changed_line_ends(cut: Path) -> None:
    code = cut / f"{MODULE}.py"
    code.write_bytes(code.read_bytes().replace(b"\n", b"\r\n"))


def gone(cut: Path) -> None:
    (cut / f"{MODULE}.py").unlink()


def linked(cut: Path) -> None:
    (cut / f"{MODULE}.py").rename(cut.parent / "code.py")
    (cut / f"{MODULE}.py").symlink_to(cut.parent / "code.py")


CHANGES = [
    other_module, other_configuration, other_repository, one_more, other_type, changed, changed_line_ends, gone, linked,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_code_than_ours_is_refused(cut: Path, tmp_path: Path, change: Any) -> None:
    change(cut)
    with pytest.raises(UntrustedError):
        transformers_model.load(cut)
    assert not (tmp_path / "hit").exists()


def test_what_lies_beside_our_code_is_not_run(cut: Path, models: Path, tmp_path: Path) -> None:
    model, clean = transformers_model.load(cut), transformers_model.load(models / "cut")
    assert torch.equal(model(tokens()).logits, clean(tokens()).logits)
    assert type(model).__name__ == "PrunedQwen3ForCausalLM"
    model.generate(tokens(), max_new_tokens=1, pad_token_id=0)
    assert not (tmp_path / "hit").exists()


def test_a_class_of_transformers_stays_one(models: Path, cut: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(models / "whole", tmp_path / "whole"))
    shutil.copy(cut / "evil.py", whole)
    (whole / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    edit(whole, **names("evil"))
    model = transformers_model.load(whole)
    assert torch.equal(model(tokens()).logits, transformers_model.load(models / "whole")(tokens()).logits)
    edit(whole, model_type="evil", architectures=["EvilForCausalLM"])
    with pytest.raises(CheckpointError, match="transformers cannot load the model"):
        transformers_model.load(whole)
    assert not (tmp_path / "hit").exists()


def test_a_checkpoint_hands_no_code_of_others_on_as_ours(models: Path, tmp_path: Path) -> None:
    to_megatron(models / "cut", tmp_path / "m")
    edit(tmp_path / "m" / "huggingface", **names("evil"))
    (tmp_path / "m" / "checksums.json").unlink()  # as whoever means harm would
    to_hf(tmp_path / "m", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() != (tmp_path / "m/huggingface/config.json").read_bytes()
    assert transformers_model.load(tmp_path / "back") is not None


def test_a_tokenizers_own_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'hit')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers asks for where it is not told
    with pytest.raises(DataError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "hit").exists()
