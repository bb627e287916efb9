"""A folder in which the programs run as a user starts them, on a tiny model and a tiny corpus."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import fork_server
import torch

ROOT = Path(__file__).parents[2]
HAS_GPU = torch.cuda.is_available()  # asked at once: a test may make the CPU look like one
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

    def run(
        self, script: str, *flags: str, ranks: int = 1, ok: bool = True, draws: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the repository's top level on so many ranks; fails the test if the program fails.

        Its pictures are blank, unless it `draws`.
        """
        if HAS_GPU:  # which cannot be forked
            return self.start(script, *flags, ranks=ranks, ok=ok)
        environment = {fork_server.DRAWS: "1"} if draws else {}
        return checked(fork_server.run([ROOT / script, *flags], ranks, self.path, environment), ok)

    def start(self, script: str, *flags: str, ranks: int = 1, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """The same as a user does it, with `python` or `torchrun`: 5 seconds of imports for each process."""
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        if ranks > max(1, torch.cuda.device_count()):  # two ranks of NCCL cannot share a GPU
            environment["MEGATRON_EXT_DEVICE"] = "cpu"
        command = [*launcher, str(ROOT / script), *flags]
        return checked(subprocess.run(command, cwd=self.path, env=environment, capture_output=True, text=True), ok)

    def metrics(self, run: str) -> list[dict[str, float]]:
        """The steps of a run directory."""
        return [json.loads(line) for line in (self.path / run / "metrics.jsonl").read_text().splitlines()]

    def loss(self, checkpoint: str, name: str) -> float:
        """The validation loss of a checkpoint, measured by `--skip-train` into the run directory `name`."""
        flags = ["--pretrained-checkpoint", checkpoint, "--skip-train", "--save", name, "--save-interval", "1"]
        self.run("pretrain_hybrid.py", *flags, *self.data)
        return json.loads((self.path / name / "results.json").read_text())["val_loss"]


def checked(done: subprocess.CompletedProcess[str], ok: bool) -> subprocess.CompletedProcess[str]:
    """A program that has ended as it should."""
    assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-4000:]
    return done
