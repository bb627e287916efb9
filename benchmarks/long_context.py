"""A trained model extended to longer sequences, through the commands: bits per byte over the context it reads.

    python benchmarks/long_context.py [--work runs/long-context] [--steps 160] [--extension-steps 48]

A tiny hybrid without positions and a tiny Transformer with RoPE are trained on 128 tokens of the Python standard
library, then on 1,024: the hybrid as it is, the Transformer with its base and with the NTK-aware one. Each model reads
the same held-out file in windows of 64 to 2,048 tokens, half a window apart. Two processes; about ten minutes.
Writes results/long_context.json, .md and .png.
"""

import argparse
import json
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine

from megatron_ext.data.corpus import build_dataset
from megatron_ext.data.documents import find_documents
from megatron_ext.models.presets import preset
from megatron_ext.models.rope_extension import ntk_base

ROOT = Path(__file__).parents[1]
SHORT, LONG, PROCESSES, TOKENS = 128, 1024, 2, 4096
WINDOWS = (64, 128, 256, 512, 1024, 2048)
HELD_OUT = ("argparse.py", "inspect.py", "tarfile.py", "typing.py")
READ = HELD_OUT[0]
ARMS = {
    "hybrid": ("tiny-hybrid", None),
    "Transformer, same base": ("tiny-transformer", "same"),
    "Transformer, NTK-aware base": ("tiny-transformer", "ntk"),
}
STYLE = {"hybrid": "C2", "Transformer, same base": "C1", "Transformer, NTK-aware base": "C0"}


def train(run: Path, data: list[str], length: int, steps: int, rate: float, *model: str) -> None:
    """Train for so many steps of `TOKENS` tokens, unless that is done."""
    if (run / f"iter_{steps:07d}" / "metadata.json").is_file():
        return
    print(f"training {run.name}", flush=True)
    batch = TOKENS // length
    micro_batch = max(1, batch // PROCESSES // 2)
    machine.torchrun(
        PROCESSES, str(ROOT / "pretrain_hybrid.py"), *model, *data, "--seq-length", str(length), "--load", str(run),
        "--save", str(run), "--micro-batch-size", str(micro_batch), "--global-batch-size", str(batch),
        "--train-iters", str(steps), "--lr", str(rate), "--min-lr", "1e-4", "--lr-decay-style", "cosine",
        "--lr-warmup-iters", "20", "--weight-decay", "0.1", "--adam-beta2", "0.95", "--clip-grad", "1.0",
        "--eval-iters", "0", "--save-interval", str(steps),
    )  # fmt: skip


def measured(run: Path, text: Path) -> dict[int, float]:
    """Bits per byte of a held-out file, by window."""
    found = {}
    for window in WINDOWS:
        out = run / f"window-{window}"
        if not (out / "results.json").is_file():
            command = ["evaluate", str(run), "--text", str(text), "--window", str(window), "--save", str(out)]
            machine.torchrun(PROCESSES, "--no-python", str(Path(sys.executable).parent / "megatron-ext"), *command)
        found[window] = json.loads((out / "results.json").read_text())["text"]["bits_per_byte"]
    return found


def arms(work: Path, steps: int, extension_steps: int) -> dict[str, dict[str, Any]]:
    """Train and measure everything."""
    library = Path(sysconfig.get_path("stdlib")).resolve()
    held_out = [library / name for name in HELD_OUT]
    inputs = [document.path for document in find_documents(None) if document.path not in held_out]
    if not (work / "data" / "manifest.json").is_file():
        build_dataset(work / "data", inputs)
    divisor = json.loads((work / "data" / "manifest.json").read_text())["vocab_divisor"]
    data = [
        "--data-path", str(work / "data" / "text_document"), "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", str(work / "data" / "tokenizer"), "--make-vocab-size-divisible-by", str(divisor),
        "--split", "98,2,0",
    ]  # fmt: skip
    found = {}
    for name, (model, base) in ARMS.items():
        arch = preset(model).architecture
        short = work / model
        train(short, data, SHORT, steps, 2e-3, "--preset", model, "--max-position-embeddings", str(SHORT))
        flags = []
        if base is not None:
            trained = replace(arch, max_position_embeddings=SHORT)
            flags = ["--rotary-base", str(arch.rotary_base if base == "same" else ntk_base(trained, LONG))]
        long = work / f"{model}-{base or 'long'}"
        train(long, data, LONG, extension_steps, 4e-4, "--pretrained-checkpoint", str(short), *flags)
        found[name] = {
            "flags": flags,
            "before": measured(short, library / READ),
            "after": measured(long, library / READ),
        }
    return found


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Bits per byte over the window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, arm in found.items():
        color = STYLE[name]
        if name != "Transformer, same base":
            label = f"{name.split(',')[0]}, trained on {SHORT}"
            axis.plot(WINDOWS, list(arm["before"].values()), "--", color=color, marker=".", label=label)
        axis.plot(WINDOWS, list(arm["after"].values()), color=color, marker="o", label=f"{name}, then on {LONG:,}")
    axis.axvline(SHORT, color="0.8", linewidth=1, zorder=0)
    axis.axvline(LONG, color="0.8", linewidth=1, zorder=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(WINDOWS, [f"{window:,}" for window in WINDOWS])
    axis.set_xlabel("window, tokens")
    axis.set_ylabel(f"bits per byte of {READ}, not trained on")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def table(found: dict[str, dict[str, Any]]) -> str:
    """The same as text."""
    lines = ["| bits per byte, window of | " + " | ".join(f"{window:,}" for window in WINDOWS) + " |"]
    lines.append("|---|" + "---|" * len(WINDOWS))
    for name, arm in found.items():
        for when in ("before", "after"):
            values = " | ".join(f"{value:.3f}" for value in arm[when].values())
            lines.append(f"| {name}, {when} | {values} |")
    return "\n".join(lines)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "long-context")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--extension-steps", type=int, default=48)
    sizes = parser.parse_args()
    sizes.work = sizes.work.absolute()
    found = arms(sizes.work, sizes.steps, sizes.extension_steps)
    report = {
        "what": "bits per byte of a held-out file over the window, before and after training on longer sequences",
        **machine.describe(),
        "sizes": {"trained_on": SHORT, "extended_to": LONG, "tokens_per_step": TOKENS, "steps": sizes.steps,
                  "extension_steps": sizes.extension_steps, "held_out": HELD_OUT, "read": READ},
        "arms": found,
    }  # fmt: skip
    machine.write(report, "long_context", table(found))
    draw(found, Path(__file__).parent / "results" / "long_context.png")


if __name__ == "__main__":
    main()
