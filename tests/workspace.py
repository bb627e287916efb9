"""A folder in which the programs run as a user starts them, on a tiny model and a tiny corpus."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Small enough for a second a step, large enough that every axis can be split in two and cut.
MODEL = [
    "--hybrid-layer-pattern=M-*-M-", "--hidden-size", "64", "--ffn-hidden-size", "96", "--num-attention-heads", "4",
    "--group-query-attention", "--num-query-groups", "2", "--kv-channels", "16", "--mamba-num-heads", "8",
    "--mamba-head-dim", "16", "--mamba-state-dim", "16", "--mamba-num-groups", "2", "--normalization", "RMSNorm",
    "--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope", "--max-position-embeddings", "64",
]  # fmt: skip
TRAIN = [
    "--lr", "2e-3", "--lr-decay-style", "constant", "--clip-grad", "1.0", "--eval-iters", "1",
    "--eval-interval", "2", "--save-interval", "2",
]  # fmt: skip


@dataclass(frozen=True)
class Workspace:
    """A folder with a corpus, in which programs run.

    Attributes:
        path: The folder.
        data: Flags that hand the corpus to a program.
    """

    path: Path
    data: list[str]

    def run(self, script: str, *flags: str, ranks: int = 1, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program of the repository's top level on so many ranks; fails the test if the program fails."""
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(
            [*launcher, str(ROOT / script), *flags], cwd=self.path, env=environment, capture_output=True, text=True
        )
        assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    def metrics(self, run: str) -> list[dict[str, float]]:
        """The steps of a run directory."""
        return [json.loads(line) for line in (self.path / run / "metrics.jsonl").read_text().splitlines()]

    def loss(self, checkpoint: str, name: str) -> float:
        """The validation loss of a checkpoint, measured by `--skip-train` into the run directory `name`."""
        flags = ["--pretrained-checkpoint", checkpoint, "--skip-train", "--save", name, "--save-interval", "1"]
        self.run("pretrain_hybrid.py", *flags, *self.data)
        return json.loads((self.path / name / "results.json").read_text())["val_loss"]
