"""The table of docs/performance.md is what the results say, and a benchmark that has not been run says so."""

import importlib.util
import json
import sys
from pathlib import Path

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


def test_what_has_not_been_run_says_so(tmp_path: Path) -> None:
    rows = performance_page.table(tmp_path).splitlines()[2:]
    assert len(rows) == len(performance_page.ROWS)
    assert all("not measured" in row for row in rows)
    found = {"cases": {"triton": {"step_seconds": 1.0, "errors": {"dx": 1.0}}}, "machine": "a machine", "date": "today"}
    (tmp_path / "ssm_gpu.json").write_text(json.dumps(found))
    assert "not measured" in performance_page.table(tmp_path).splitlines()[2]  # the peer is missing
    found["cases"]["mamba_ssm"] = {"step_seconds": 1.5, "errors": {"dx": 2.0}}
    (tmp_path / "ssm_gpu.json").write_text(json.dumps(found))
    speed, errors = performance_page.table(tmp_path).splitlines()[2:4]
    assert "1.50x" in speed
    assert "0.50x of theirs" in errors
