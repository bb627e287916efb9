"""The table of docs/performance.md is what the results say, and a benchmark that has not been run says so."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "performance_page.py"
spec = importlib.util.spec_from_file_location("performance_page", SCRIPT)
assert spec is not None
assert spec.loader is not None
performance_page = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = performance_page
spec.loader.exec_module(performance_page)


def test_the_page_is_up_to_date() -> None:
    """Otherwise: python benchmarks/performance_page.py."""
    text = performance_page.PAGE.read_text()
    assert performance_page.page(text, performance_page.table()) == text


GPU = {"machine": "a processor", "device": "a GPU", "date": "today"}
SPEED = {"step_seconds": 1.0, "errors": {"y": 1.0, "dx": 1.0}}
SIZE = {"cases": {"triton": SPEED, "mamba_ssm": {"step_seconds": 1.5, "errors": {"y": 1.0, "dx": 2.0}}}, "missing": {}}
MODELS = ("Transformer", "Mamba-2", "hybrid")
CONTEXT = {"131072": {"tokens_per_second": 4.0, "roofline_tokens_per_second": 5.0}}
COMPLETE: dict[str, Any] = {
    "gpu_ceilings": {"copy_bytes_per_second": 4.3e12, "matmul_flops": 790e12},
    "ssm_gpu": {"sizes": dict.fromkeys(("full", "batch", "tp8", "context"), SIZE)},
    "ssm_gpu_norm": {"sizes": dict.fromkeys(("full", "batch", "tp8", "context"), SIZE)},
    "pretrain_cuda": {
        "models": {key: {"ratio": 1.25, "ours": {"mfu": 0.5, "tokens_per_second": 6e4}} for key in MODELS}
    },
    "decode_cuda": {"models": dict.fromkeys(("hybrid", "Transformer, full heads", "Transformer, grouped"), CONTEXT)},
    "memory_cuda": {"ratios": {"a": 0.95, "b": 1.05}, "cases": {"a": {}, "b": {}, "c": {"error": "no memory"}}},
    "kd_loss_cuda": {
        "compare": "loss_in_triton",
        "cases": {
            name: {"seconds": time, "peak_bytes": 2.0, "errors": {"dx": 1e-3, "dw": 1e-3}}
            for name, time in (("plain", 2.0), ("ours", 1.0), ("liger", 4.0))
        },
    },
    "calibration_cuda": {"ratio": 1.1},
}  # fmt: skip
FAILED: dict[str, Any] = {
    "gpu_ceilings": {"copy_bytes_per_second": None, "matmul_flops": {"error": "out of memory"}},
    "ssm_gpu": {"sizes": {"full": {"cases": {"triton": SPEED}, "missing": {"mamba_ssm": "not installed: mamba_ssm"}}}},
    "ssm_gpu_norm": {"error": "Traceback:\n| no device |"},
    "pretrain_cuda": {"models": {"Transformer": {"error": "it did not start"}, "Mamba-2": {"peer_missing": "no peer"}}},
    "decode_cuda": {
        "models": {
            "hybrid": {"1024": {}},
            "Transformer, full heads": {"2048": {}, "error": "late"},
            "Transformer, grouped": {},
        },
        "missing": {"Transformer, grouped": "failed: it was killed"},
    },
    "memory_cuda": {"ratios": {}, "cases": {"c": {"error": "no memory"}}},
    "kd_loss_cuda": {"cases": {"plain": {"error": "x" * 500}, "ours": {"seconds": 0.0}}},
    "calibration_cuda": [1.1],
}


def rows(folder: Path, results: dict[str, Any]) -> dict[tuple[str, str], str]:
    """What is shown of a figure, by its name and file."""
    for name, found in results.items():
        (folder / f"{name}.json").write_text(json.dumps(GPU | found if isinstance(found, dict) else found))
    lines = performance_page.table(folder).splitlines()[2:]
    assert all(line.count("|") == 6 for line in lines), "a reason must not break the table"
    cells = [line.split(" | ") for line in lines]
    return {(row.what, row.result): cell[1] for row, cell in zip(performance_page.ROWS, cells, strict=True)}


def test_what_has_not_been_run_says_so(tmp_path: Path) -> None:
    assert set(rows(tmp_path, {}).values()) == {"not measured"}


def test_every_figure_of_a_gpu_is_shown(tmp_path: Path) -> None:
    found = rows(tmp_path, COMPLETE)
    measured = {key: value for key, value in found.items() if key[1] in COMPLETE}
    assert len(measured) == 25
    assert not [key for key, value in measured.items() if "not measured" in value]
    assert {value for key, value in found.items() if key[1] not in COMPLETE} == {"not measured"}
    shown = list(measured.values())
    for expected in (
        "4.30 TB/s", "790 TFLOP/s", "1.50x", "at most 1.00x of theirs", "1.25x", "50.0% (60,000 tokens/s)",
        "1.0x at 131,072 tokens (bytes allow 1.0x)", "0.95x to 1.05x (failed: c)", "0.50x (`loss_in_triton`)",
        "0.25x (`loss_in_triton`)", "at most 1.00x (1.0e-03)", "1.10x",
    ):  # fmt: skip
        assert expected in shown, expected
    assert "a GPU, today" in performance_page.table(tmp_path)


def test_what_failed_says_why(tmp_path: Path) -> None:
    found = rows(tmp_path, FAILED)
    assert all(value.startswith("not measured") for value in found.values())
    shown = " ".join(found.values())
    for why in (
        "no copy_bytes_per_second", "out of memory", "not installed: mamba_ssm", "no tp8", "Traceback: / no device /",
        "it did not start", "no peer", "no hybrid", "no memory", "failed: it was killed", "x...", "no liger", "late",
    ):  # fmt: skip
        assert f"not measured: {why}" in shown or why in shown, why


def test_a_broken_file_does_not_stop_the_page(tmp_path: Path) -> None:
    (tmp_path / "calibration_cuda.json").write_text("{")
    assert "not measured: calibration_cuda.json cannot be read" in performance_page.table(tmp_path)
