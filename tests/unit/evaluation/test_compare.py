import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext import cli
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.evaluation.compare import as_json, markdown, names
from megatron_ext.evaluation.compare_rows import rows
from megatron_ext.evaluation.measured_run import Run
from megatron_ext.models import cost
from megatron_ext.models.presets import preset

HYBRID, TRANSFORMER = (preset(name).architecture for name in ("mamba2-hybrid-8b", "llama3.1-minitron-4b-width"))


def measured(loss: float, scale: float) -> dict[str, Any]:
    lengths = {str(2**k): scale / k for k in range(8, 15)}
    settings = {"dtype": "float32", "tokenizer": "9 tokens, 0"}
    asked = {**settings, "window": 64, "limit": None, "chat": None, "generation": {}, "num_fewshot": 0}
    return {
        "text": {
            "loss": 2 * loss, "bits_per_byte": loss, "bytes": 100, "size": 64, "stride": 32,
            "settings": {**settings, "window": 64, "stride": 32, "texts": "0"},
        },
        "tasks": {"quiz": {"acc": 0.5 * scale, "acc_stderr": 0.1, "samples": 6, "cut": 0, "settings": asked}},
        "synthetic": {"needle": {length: {"accuracy": 4 * value} for length, value in lengths.items()}},
        "speed": {
            length: {
                "prefill_tokens_per_second": 1e6 * value, "decode_tokens_per_second": 1e3 * value, "batch_size": 8,
                "ranks": 1, "settings": {"dtype": "float32", "batch_size": 8, "ranks": 1},
            }
            for length, value in lengths.items()
        },
    }  # fmt: skip


def run(folder: Path, architecture: Any, **sections: Any) -> Path:
    folder.mkdir(parents=True)
    checkpoint = {"path": str(folder), "step": "release", "fingerprint": "0", "architecture": architecture.to_dict()}
    (folder / "results.json").write_text(json.dumps({"checkpoint": checkpoint, **sections}))
    return folder


@pytest.fixture
def both(tmp_path: Path) -> list[Path]:
    (tmp_path / "llama").mkdir()
    first = run(tmp_path / "llama" / "run", TRANSFORMER, **measured(0.9, 1.0), val_loss=2.5)
    second = run(tmp_path / "hybrid" / "run", HYBRID, **measured(0.8, 1.2))
    (second / "metrics.jsonl").write_text('{"step": 1, "val_loss": 9.0}\n{"step": 2, "val_loss": 2.25}\n{"step"')
    return [first, second]


def test_each_quantity_is_read_or_counted(both: list[Path]) -> None:
    table = {row.label: row.values for row in rows([Run.read(path, str(path)) for path in both])}
    assert table["step"] == ["release", "release"]
    assert table["parameters"] == [f"{arch.num_parameters():,}" for arch in (TRANSFORMER, HYBRID)]
    assert table["KV cache per token, bytes"] == ["131,072", "16,384"]  # 2 bytes x 2 x 8 groups x 128 x 32 or 4 layers
    assert table["SSM states per sequence, bytes"] == ["0", f"{cost.state_bytes_per_sequence(HYBRID):,}"]
    assert table["validation loss, nats per token"] == ["2.5000", "2.2500"]
    assert table["text: bits per byte"] == ["0.9000", "0.8000"]
    assert table["quiz: acc"] == ["0.5000", "0.6000"]
    assert table["needle at 256"] == ["50%", "60%"]
    assert table["prefill at 16,384, tokens/s"] == ["71,428.6", "85,714.3"]
    assert "quiz: acc_stderr" not in table
    assert "parameters that a token uses" not in table


def test_what_was_not_measured_is_a_dash_and_what_is_unequal_is_said(tmp_path: Path, both: list[Path]) -> None:
    other = measured(0.7, 1.0)
    other["text"]["settings"] |= {"texts": "1", "tokenizer": "8 tokens, 0"}
    other["text"]["loss"] = None  # it diverged
    other["tasks"]["quiz"]["settings"] |= {"num_fewshot": 5, "limit": 2, "window": 32}  # into which all fits
    other["synthetic"]["needle"]["256"]["settings"] = {"seed": 1}
    other["speed"] = {"256": {**other["speed"]["256"], "settings": {"dtype": "float32", "batch_size": 8, "ranks": 2}}}
    paths = [both[0], run(tmp_path / "bare", HYBRID), run(tmp_path / "other", HYBRID, **other)]
    runs = [Run.read(path, path.name) for path in paths]
    table = {row.label: row.values for row in rows(runs)}
    assert table["text: bits per byte (unequal texts 0 | - | 1)"] == ["0.9000", "-", "0.7000"]
    assert table["text: loss, nats per token (unequal tokenizer 9 tokens, 0 | - | 8 tokens, 0; texts 0 | - | 1)"] == [
        "1.8000", "-", "nan",
    ]  # fmt: skip
    assert table["decode at 256, tokens/s (unequal ranks 1 | - | 2)"] == ["125.0", "-", "125.0"]
    assert table["quiz: acc (unequal few-shot 0 | - | 5; limit none | - | 2)"] == ["0.5000", "-", "0.5000"]
    assert table["needle at 256 (unequal seed ? | - | 1)"] == ["50%", "-", "50%"]
    assert table["needle at 512"][0] == "44%"
    assert [run["unequal"].get("quiz: acc") for run in as_json(runs, rows(runs)).values()] == [
        {"num_fewshot": 0, "limit": "none"}, {"num_fewshot": None, "limit": None}, {"num_fewshot": 5, "limit": 2},
    ]  # fmt: skip
    # Where something was cut to the window, the window matters.
    other["tasks"]["quiz"]["cut"] = 1
    runs[2] = Run.read(run(tmp_path / "cut", HYBRID, **other), "cut")
    assert "window 64 | - | 32" in next(row.label for row in rows(runs) if row.what == "quiz: acc")


def test_validation_losses_say_on_what_they_were_measured(tmp_path: Path) -> None:
    """A training measures on some batches of the split, `--skip-train` on all: two losses of one model."""
    whole = {"tokens": 65536, "source": "--skip-train", "data": ["d"], "split": "96,4,0", "dtype": "float32"}
    measured = {"loss": 4.646, "sequences": 256, "tokens": 65536, "settings": whole}
    first = run(tmp_path / "first", HYBRID, val_loss=4.646, validation=measured)
    second = run(tmp_path / "second", HYBRID)
    (second / "metrics.jsonl").write_text('{"step": 2, "val_loss": 4.516}\n')
    flags = {"eval_iters": 8, "global_batch_size": 8, "seq_length": 256, "data_path": ["d"], "split": "96,4,0"}
    (second / "config.yaml").write_text(json.dumps({"flags": {**flags, "params_dtype": "torch.float32"}}))
    runs = [Run.read(path, path.name) for path in (first, second)]
    (row,) = [row for row in rows(runs) if row.what.startswith("validation")]
    assert row.label == (
        "validation loss, nats per token (unequal tokens 65,536 | 16,384; source --skip-train | training's log)"
    )
    assert row.values == ["4.6460", "4.5160"]
    (row,) = [row for row in rows(runs[1:]) if row.what.startswith("validation")]
    assert row.label == "validation loss, nats per token, over 16,384 tokens (training's log)"
    assert cli.main(["compare", str(first), str(second), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert r"(unequal tokens 65,536 \| 16,384; source" in page


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    assert names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert names([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    with pytest.raises(ConfigError, match="twice"):
        names([tmp_path / "a", tmp_path / "a"])


def test_the_command_prints_and_writes(tmp_path: Path, both: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["compare", *map(str, both), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "llama/run" in printed
    assert "131,072" in printed
    page = (out / "comparison.md").read_text()
    assert page == markdown(*_read(both))
    assert "| text: bits per byte | 0.9000 | 0.8000 |" in page
    assert list(json.loads((out / "comparison.json").read_text())) == ["llama/run", "hybrid/run"]
    assert (out / "comparison.png").stat().st_size > 30_000


def _read(paths: list[Path]) -> tuple[list[Run], Any]:
    runs = [Run.read(path, name) for path, name in zip(paths, names(paths), strict=True)]
    return runs, rows(runs)


def test_runs_without_measurements_are_drawn_too(tmp_path: Path) -> None:
    path = run(tmp_path / "bare", HYBRID)
    assert cli.main(["compare", str(path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "comparison.png").is_file()


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a checkpoint nor results"):
        Run.read(tmp_path, "x")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Run.read(tmp_path, "x")


def test_only_a_comparison_is_overwritten(tmp_path: Path, both: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["compare", *map(str, both), "--out", str(out)]
    assert cli.main(words) == 0
    numbers, page = (out / f"comparison.{ending}" for ending in ("json", "md"))
    numbers.write_text(numbers.read_text().replace("0.9", "0.7"))
    assert cli.main(words) == 0
    assert "0.7" not in numbers.read_text()
    ours = page.read_text()
    for file, text in ((page, "# My notes\n"), (numbers, "{}"), (numbers, '{"mine": {}}'), (numbers, "not JSON")):
        before = file.read_text()
        file.write_text(text)
        assert cli.main(words) == 2
        assert "comparison of ours" in capsys.readouterr().err
        assert file.read_text() == text
        file.write_text(before)
    numbers.unlink()
    assert cli.main(words) == 2
    assert page.read_text() == ours
