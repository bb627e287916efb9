"""A measure of another package: its flag, its section of `results.json`, its row in a comparison."""

import json
import os
import sys
from pathlib import Path

import fork_server
import pytest
from workspace import Workspace

from megatron_ext.checkpoint.reader import CheckpointReader

COMMAND = Path(sys.executable).with_name("megatron-ext")
MODULE = """
from megatron_ext.evaluation.measure import Measure, MeasureKind
from megatron_ext.evaluation.rows import Row, differences, shown


class NormMeasure(Measure):
    name = "norms"

    def __init__(self, evaluation):
        self._settings = {"dtype": evaluation.settings["dtype"]}

    def __call__(self, model):
        weights = [p.detach().double() for chunk in model.chunks for p in chunk.parameters()]
        yield {"squared": sum(float(w.pow(2).sum()) for w in weights), "settings": self._settings}

    def say(self, found):
        return f"squared norm {found['squared']:.3f}"

    def finish(self, results):
        (results.directory / "norms.txt").write_text(str(results.section("norms")["squared"]))


def rows(runs):
    found = [run.results.get("norms", {}) for run in runs]
    return [Row("squared norm", shown(found, "squared", "{:.3f}"), differences(found))] if any(found) else []


def add_arguments(parser):
    parser.add_argument("--norms", action="store_true", help="how large the weights are")


KIND = MeasureKind(add_arguments, lambda args: args.norms, NormMeasure, rows, lambda runs: [])
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What `pip install` would leave of a package with an entry point."""
    (tmp_path / "norms.py").write_text(MODULE)
    about = tmp_path / "norms-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: norms\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[megatron_ext.measures]\nnorms = norms:KIND\n")
    return tmp_path


def test_a_package_adds_a_measure(workspace: Workspace, teacher: str, package: Path) -> None:
    paths = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*words: str) -> str:
        done = fork_server.run([COMMAND, *words], cwd=workspace.path, environment={"PYTHONPATH": paths})
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    said = run("evaluate", teacher, "--norms", "--save", "normed")
    reader = CheckpointReader(workspace.path / teacher)
    weights = [reader.read(key).double() for key in reader.shapes if not key.startswith("optimizer")]
    expected = sum(float(weight.pow(2).sum()) for weight in weights)
    found = json.loads((workspace.path / "normed" / "results.json").read_text())["norms"]
    assert found["squared"] == pytest.approx(expected, rel=1e-9)
    assert float((workspace.path / "normed" / "norms.txt").read_text()) == found["squared"]
    assert f"squared norm {expected:.3f}" in said
    page = run("compare", teacher, "normed")
    assert f"{expected:.3f}" in next(line for line in page.splitlines() if line.startswith("squared norm"))
