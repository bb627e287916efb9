"""The small reliability matrix: jobs are killed, files damaged, payloads shown, and all is as it should be."""

import json
import os
import subprocess
import sys
from pathlib import Path

from workspace import ROOT

from benchmarks.reliability import page


def test_what_is_broken_on_purpose_is_noticed_or_mended(tmp_path: Path) -> None:
    """A few cases of most parts; docs/reliability.md has the whole matrix."""
    command = [sys.executable, "-m", "benchmarks.reliability", "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "reliability.json").read_text())["parts"]
    assert found.keys() == {"kills", "corruptions", "payloads"}
    assert all(case["kills"] == 2 for case in found["kills"].values())
    assert found["corruptions"]["checkpoint"]["damages"] == found["corruptions"]["checkpoint"]["files"]
    assert all(page.verdict(part, case) == page.GOOD for part, cases in found.items() for case in cases.values())
