"""The smallest models and data that every job can work on, made once for all parts of the matrix."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reliability.jobs import CONSOLE, ROOT, Ended, Server

PRETRAIN, DISTILL, PRUNE = (ROOT / name for name in ("pretrain_hybrid.py", "distill_gpt.py", "prune_gpt.py"))
# Every axis can be split in two and cut.
MODEL = [
    "--hybrid-layer-pattern=M-*-", "--hidden-size", "32", "--ffn-hidden-size", "48", "--num-attention-heads", "4",
    "--group-query-attention", "--num-query-groups", "2", "--kv-channels", "8", "--mamba-num-heads", "4",
    "--mamba-head-dim", "8", "--mamba-state-dim", "8", "--mamba-num-groups", "2", "--normalization", "RMSNorm",
    "--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope", "--max-position-embeddings", "64",
]  # fmt: skip
# A class of transformers', for conversions both ways.
LLAMA = [
    "--hybrid-layer-pattern=*-*-", "--hidden-size", "32", "--ffn-hidden-size", "48", "--num-attention-heads", "4",
    "--norm-epsilon", "1e-6", "--max-position-embeddings", "64", "--position-embedding-type", "rope", "--swiglu",
    "--disable-bias-linear", "--normalization", "RMSNorm", "--untie-embeddings-and-output-weights",
]  # fmt: skip
DATA = [
    "--data-path", "data/text_document", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
    "data/tokenizer", "--make-vocab-size-divisible-by", "8", "--split", "90,10,0", "--padded-vocab-size", "512",
]  # fmt: skip
SIZES = ["--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4"]
TRAIN = [
    *SIZES, "--lr", "2e-3", "--lr-decay-style", "constant", "--clip-grad", "1.0", "--eval-iters", "1",
    "--eval-interval", "1000", "--save-interval", "1",
]  # fmt: skip
CUT = ["--prune-hidden-size", "16", "--prune-ffn-hidden-size", "24", "--prune-samples", "4"]
CHARACTERS = 6000  # of each text


@dataclass(frozen=True)
class Tiny:
    """A folder with data sets `data` and `little`, and models `teacher` (three steps), `pruned`, `llama`, `llama-hf`.

    Attributes:
        path: The folder; jobs run in it.
        server: Starts the jobs.
    """

    path: Path
    server: Server

    def console(self, *words: str | Path) -> Ended:
        """Run `megatron-ext WORDS`, and wait."""
        return self.server.run([CONSOLE, *words], self.path)

    def copy(self, name: str, new: str) -> Path:
        """A directory once more, in the place of what is there."""
        shutil.rmtree(self.path / new, ignore_errors=True)
        return shutil.copytree(self.path / name, self.path / new)


def make(path: Path, server: Server, small: bool = False) -> Tiny:
    """Make what is not there yet; for the small matrix `data` and `teacher` alone."""
    path.mkdir(parents=True, exist_ok=True)
    if not (texts := path / "texts").exists():
        library = Path(json.__file__).parents[1]
        texts.mkdir()
        for file in sorted(library.glob("a*.py")) + sorted(library.glob("c*.py")):
            (texts / file.name).write_text(file.read_text()[:CHARACTERS])
    few = [f"texts/{name}.py" for name in ("ast", "cmd", "copy")]
    train = [*DATA, *TRAIN, "--train-iters", "3", "--save"]
    commands: dict[str, list[str | Path]] = {
        "data": [CONSOLE, "data", "--out", "data", "--vocab-size", "512", "--input", "texts"],
        "teacher": [PRETRAIN, *MODEL, *train, "teacher"],
        "little": [CONSOLE, "data", "--out", "little", "--tokenizer", "data/tokenizer", "--input", *few],
        "pruned": [PRUNE, "--load", "teacher", "--save", "pruned", *DATA, *SIZES, *CUT],
        "llama": [PRETRAIN, *LLAMA, *train, "llama"],
        "llama-hf": [CONSOLE, "convert", "--from", "megatron", "--to", "hf", "llama", "llama-hf"],
    }
    for name, command in list(commands.items())[: 2 if small else None]:
        if not (path / name).exists():
            server.check(command, path)
    return Tiny(path, server)
