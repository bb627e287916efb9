"""A small hybrid model trained on the Python standard library, for benchmarks that need one that has learned something.

Every other training sequence is made of lists of random words that repeat, so that the model also learns to copy:
that is the generation task, by which the benchmarks see what a loss on text does not show.
"""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from megatron_ext.data.corpus import build_dataset
from megatron_ext.evaluation.questions import Sample

ROOT = Path(__file__).parents[1]
SEQUENCE, BATCH, PROCESSES = 256, 8, 2
MODEL = [
    "--hybrid-layer-pattern=M-*-M-*-M-*-M-*-", "--hidden-size", "128", "--ffn-hidden-size", "384",
    "--num-attention-heads", "4", "--group-query-attention", "--num-query-groups", "4", "--kv-channels", "32",
    "--mamba-num-heads", "8", "--mamba-head-dim", "32", "--mamba-state-dim", "32", "--mamba-num-groups", "2",
    "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--position-embedding-type", "none",
    "--max-position-embeddings", "1024",
]  # fmt: skip
SHARE = 0.5  # of the training sequences that repeat
WORDS = 64  # that lists are made of
LIST, SHOWN, ASKED = 16, 4, 4  # words of a question's list, of its beginning that comes again, and of the answer
QUESTION = f"{LIST} words, the first {SHOWN} again; the next {ASKED} are the answer"


def build_data(out: Path) -> Path:
    """The two datasets, `text` and `copies`, unless they are there; the folder of their tokenizer."""
    if not (out / "text" / "manifest.json").is_file():
        build_dataset(out / "text")
    tokenizer = out / "text" / "tokenizer"
    if not (out / "copies" / "manifest.json").is_file():
        lines = out / "copies.jsonl"
        lines.write_text("".join(_repeated(tokenizer, 8000)))
        build_dataset(out / "copies", [lines], tokenizer)
    return tokenizer


def train(out: Path, steps: int) -> Path:
    """Build the data and train, unless that is done; the run directory."""
    build_data(out)
    model = out / f"model-{steps}"
    if (model / f"iter_{steps:07d}" / "metadata.json").is_file():
        return model
    command = [
        str(ROOT / "pretrain_hybrid.py"), *MODEL, *data_flags(out, BATCH // PROCESSES),
        "--data-path", str(1 - SHARE), str(out / "text" / "text_document"), str(SHARE),
        str(out / "copies" / "text_document"), *schedule(steps), "--load", str(model), "--save", str(model),
    ]  # fmt: skip
    torchrun(command, model.with_suffix(".log"))
    return model


def schedule(steps: int, learning_rate: float = 3e-3) -> list[str]:
    """Optimizer flags: AdamW, a short warm-up, and a cosine."""
    return [
        "--train-iters", str(steps), "--lr", str(learning_rate), "--min-lr", str(learning_rate / 30),
        "--lr-decay-style", "cosine", "--lr-warmup-iters", str(min(50, steps // 2)), "--weight-decay", "0.1",
        "--adam-beta2", "0.98", "--clip-grad", "1.0", "--eval-interval", "200", "--eval-iters", "4",
        "--save-interval", str(steps),
    ]  # fmt: skip


def data_flags(out: Path, micro_batch: int) -> list[str]:
    """What training and measuring have in common; the data paths are not."""
    manifest = json.loads((out / "text" / "manifest.json").read_text())
    return [
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(out / "text" / "tokenizer"),
        "--make-vocab-size-divisible-by", str(manifest["vocab_divisor"]), "--split", "96,4,0",
        "--seq-length", str(SEQUENCE), "--micro-batch-size", str(micro_batch), "--global-batch-size", str(BATCH),
    ]  # fmt: skip


def torchrun(command: Sequence[str], log: Path) -> None:
    """Run a script of the repository on `PROCESSES` processes; what it prints goes into `log`."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    print(f"{Path(command[0]).name}: the log is {log}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        subprocess.run([*start, *command], stdout=file, stderr=file, env=environment, check=True)


def questions(tokenizer: Path, count: int, seed: int) -> list[Sample]:
    """Lists of random words, each with its beginning once more; the answer is what comes next."""
    draw, known, samples = random.Random(seed), [number for number, _ in _words(tokenizer)], []
    for _ in range(count):
        items = draw.choices(known, k=LIST)
        samples.append(Sample([*items, *items[:SHOWN]], items[SHOWN : SHOWN + ASKED]))
    return samples


def _repeated(tokenizer: Path, documents: int) -> Iterator[str]:
    """JSONL lines: lists of random words, each four to eight times."""
    draw, known = random.Random(1), _words(tokenizer)
    for _ in range(documents):
        text = "".join(word for _, word in draw.choices(known, k=draw.randint(8, 24)))
        yield json.dumps({"text": text * draw.randint(4, 8)}) + "\n"


def _words(tokenizer: Path) -> list[tuple[int, str]]:
    """The first words of the vocabulary that are one token each, with their ids."""
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab()
    found = [(number, token) for token, number in vocabulary.items() if re.fullmatch("Ġ[A-Za-z]{3,}", token)]
    return [(number, " " + token[1:]) for number, token in sorted(found)[:WORDS]]
