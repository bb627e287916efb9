"""The demo with a real model: what is trained on is not measured on, all cuts are alike but for what they cut by."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatron_ext.cli import main
from megatron_ext.demo import real_model, real_report
from megatron_ext.errors import ConfigError
from megatron_ext.workflow import Stage


def value(stage: Stage, flag: str) -> str:
    return stage.words[stage.words.index(flag) + 1]


@pytest.mark.parametrize("debian", [False, True])
def test_the_texts_are_named_and_what_is_measured_is_not_trained_on(
    tmp_path: Path, debian: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some.pod").write_text("a document")
    monkeypatch.setattr(real_model, "DEBIAN", (f"{tmp_path}/*.pod",) if debian else ())
    said = real_model.write_texts(tmp_path / "texts")
    trained = [json.loads(line)["text"] for line in (tmp_path / "texts" / "train.jsonl").read_text().splitlines()]
    measured = (tmp_path / "texts" / "held-out.txt").read_text()
    assert len(measured) == real_model.HELD_OUT_CHARACTERS
    assert not any(measured[:200] in text for text in trained)
    assert len(trained) > 50
    assert "Python's manual" in said["trained and calibrated on"]
    assert said["and, of Debian's documents"].startswith("1 files, 10 characters: some.pod" if debian else "none")
    assert ("a document" in trained) == debian
    questions = (tmp_path / "texts" / "questions.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in questions] == list(real_model.QUESTIONS)


def test_cuts_differ_in_their_metric_alone(tmp_path: Path) -> None:
    stages = {stage.title: stage for stage in real_model.first_stages(tmp_path, real_model.CPU, Path("a.gguf"))}
    cuts = [stages[f"prune by {metric}"] for metric in real_model.METRICS]
    rest = []
    for metric, stage in zip(real_model.METRICS, cuts, strict=True):
        assert value(stage, "--prune-depth-metric") == metric
        own = {metric, str(stage.directory), "--prune-depth-samples", str(real_model.CPU.depth_samples)}
        rest.append([word for word in stage.words if word not in own])
    assert rest[0] == rest[1] == rest[2]
    losses = [stage for title, stage in stages.items() if title.startswith("measure")]
    assert len({(value(stage, "--text"), value(stage, "--window")) for stage in losses}) == 1
    assert len(losses) == len(real_model.METRICS) + 2


def test_the_best_cut_is_distilled_and_goes_back(tmp_path: Path) -> None:
    for name, loss in zip(map(real_model.cut, real_model.METRICS), (3.0, 2.5, 2.75), strict=True):
        folder = tmp_path / "losses" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"text": {"loss": loss}}))
    assert real_model.best_cut(tmp_path) == "by-relative-l2"
    stages = {stage.title: stage for stage in real_model.last_stages(tmp_path, real_model.GPU, "by-relative-l2")}
    assert Path(value(stages["distil"], "--pretrained-checkpoint")).name == "by-relative-l2"
    assert "--bf16" in stages["distil"].words
    assert value(stages["convert back to GGUF"], "--to") == "gguf"
    assert {f"ask {name}" for name in ("smollm2", "by-relative-l2", "distilled")} <= stages.keys()


def test_a_package_that_cannot_be_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    failed = SimpleNamespace(returncode=1, stderr="no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *words, **settings: failed)
    with pytest.raises(ConfigError, match=r"could not be installed(.|\n)*no network"):
        real_model.model_file(Console(quiet=True))


def test_gpu_is_for_the_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--gpu", "--out", str(tmp_path / "out")]) == 2
    assert "--gpu goes with --real" in capsys.readouterr().err


def numbers() -> dict[str, object]:
    """Of a model of four layers."""
    row = {"params": 100, "attention": 4, "mlps": 4, "cache_bytes_per_token": 2048, "bits_per_byte": 0.8}
    models = {"smollm2": row | {"loss": 2.0, "pattern": "*-" * 4, "kept": None}}
    for place, metric in enumerate(real_model.METRICS):
        models[real_model.cut(metric)] = row | {
            "attention": 3, "loss": 3.0 + place, "pattern": "*-*-*--", "kept": [0, 1, 2, 3, 4, 5, 7],
        }  # fmt: skip
    models["without-mlps"] = row | {"mlps": 3, "loss": 9.0, "pattern": "**-*-*-", "kept": [0, 2, 3, 4, 5, 6, 7]}
    models["distilled"] = row | {"attention": 3, "loss": 2.25, "pattern": "*-*-*--", "kept": None}
    answer = [{"prompt": "Who?", "text": "Nobody.\nReally."}]
    return {
        "models": models, "best": "by-block-influence", "texts": {"measured on": "a text"},
        "answers": dict.fromkeys(("smollm2", "by-block-influence", "distilled"), answer),
        "distillation": {"tokens": 61_440, "seconds": 300.0, "history": []}, "measured": {"tokens": 7, "window": 8},
        "seconds": {"distil": 300.0}, "settings": {}, "versions": {}, "machine": {},
    }  # fmt: skip


def test_the_report_says_what_was_lost_and_won_back(tmp_path: Path) -> None:
    real_report.write_report(tmp_path, numbers())
    page = (tmp_path / "report.md").read_text()
    assert "Without 1 of 4 attention sub-layers SmolLM2-135M is 1.00 nats worse" in page
    assert "distillation on 61.4 k tokens brings 75% of that back" in page
    assert "| without 1 MLPs, by block influence | 100 | 4 | 3 | 2.0 KiB | 9.000 | 0.800 |" in page
    assert "- distilled: Nobody. Really." in page
    assert (tmp_path / "report.png").stat().st_size > 10_000
    (tmp_path / "report.png").unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.png").is_file()
