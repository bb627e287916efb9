"""What is left of a small image classifier that is halved, and retrained with and without its teacher's logits.

    python benchmarks/vision_compression.py --out runs/vision_compression

The smallest preset learns scikit-learn's digits, as a user would start it; `prune` cuts it to half of its parameters,
by widths alone and by widths and blocks; each is then trained for the same few steps by the labels, and by the
teacher's logits with a tenth of the labels. Beside them the same small network from random weights. Seeds differ in
first weights and order of images, and each seed's arms begin from one teacher, so that differences are paired. A tiny
task: it shows that the parts work together, and says nothing of ImageNet. Writes results/vision_compression_cpu.json
and .md; a run that is there is not done again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine
import numpy as np
from PIL import Image

HELD_OUT, BATCH = 320, 64
IMAGES = ["--images-train", "train", "--micro-batch-size", str(BATCH), "--global-batch-size", str(BATCH)]
TRAINED = [
    *IMAGES, "--images-valid", "valid", "--images-augment", "none", "--images-mixup", "0", "--images-cutmix", "0",
    "--images-flip", "0", "--images-erasing", "0", "--images-smallest", "0.7", "--lr-decay-style", "cosine",
    "--eval-iters", str(HELD_OUT // BATCH),
]  # fmt: skip
HALF = ["--load", "{seed}/teacher", *IMAGES, "--prune-samples", "512", "--prune-target-params", "0.5"]
CUTS = {"widths": HALF, "widths and blocks": [*HALF, "--prune-blocks", "6"]}
LESSON = [
    "--distill-teacher", "{seed}/teacher", "--distill-temperature", "2", "--distill-kd-weight", "0.9",
    "--distill-ce-weight", "0.1",
]  # fmt: skip


def write_images(out: Path) -> None:
    """The digits as folders of pictures, of which some are held out."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    for place, index in enumerate(np.random.default_rng(0).permutation(len(found.images))):
        folder = out / ("valid" if place < HELD_OUT else "train") / str(found.target[index])
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((found.images[index] * 255 / 16).astype("uint8"))
        picture.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB").save(folder / f"{index}.png")


def command(out: Path, seed: int, save: str, words: list[str]) -> Path:
    """Run a job of `megatron-ext` in the folder of the images, unless it is done; its run directory."""
    words = [word.format(seed=seed) for word in words]
    run = out / str(seed) / save
    if not (run / "done").exists():
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        full = [sys.executable, "-m", "megatron_ext", *words, "--save", str(run.relative_to(out)), "--seed", str(seed)]
        done = subprocess.run(full, cwd=out, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(full)}\n{done.stderr[-4000:]}")
        (run / "done").touch()
    return run


def last(run: Path) -> dict[str, float]:
    """What the validation at the end of a run has found: share of images that are told rightly, and nats."""
    step = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {"top_1": step["val_top_1"], "loss": step["val_loss"]}


def measure(out: Path, seed: int, steps: int, few: int) -> dict[str, Any]:
    """All arms of a seed."""
    ends = ["--eval-interval", "{0}", "--save-interval", "{0}", "--train-iters", "{0}"]
    long, short = ([word.format(n) for word in ends] for n in (steps, few))
    first = ["vision", "--preset", "mambavision-nano", *TRAINED, *long, "--lr", "1e-3", "--lr-warmup-fraction", "0.1"]
    found: dict[str, Any] = {"teacher": last(command(out, seed, "teacher", first))}
    again = [*TRAINED, *short, "--lr", "5e-4"]
    for name, cut in CUTS.items():
        short_name = name.replace(" ", "-")
        pruned = command(out, seed, f"pruned-{short_name}", ["prune", *cut])
        begin = ["--pretrained-checkpoint", f"{seed}/{pruned.name}"]
        at_once = ["vision", *IMAGES, "--images-valid", "valid", *begin, "--skip-train"]
        results = json.loads((command(out, seed, f"at-once-{short_name}", at_once) / "results.json").read_text())
        own: dict[str, Any] = {"at once": {key: results["validation"][key] for key in ("top_1", "loss")}}
        own["labels"] = last(command(out, seed, f"labels-{short_name}", ["vision", *begin, *again]))
        own["teacher's logits"] = last(command(out, seed, f"logits-{short_name}", ["distill", *LESSON, *begin, *again]))
        fresh = ["vision", "--preset", f"{seed}/{pruned.name}", *again, "--lr", "1e-3"]
        own["random weights, labels"] = last(command(out, seed, f"fresh-{short_name}", fresh))
        plan = json.loads((pruned / "plan.json").read_text())
        own["pattern"], own["widths"] = plan["target"]["pattern"], plan["target"]["widths"]
        own["parameters"] = count(plan["target"])
        found[name] = own
    return found


def count(model: dict[str, Any]) -> int:
    """Parameters."""
    from megatron_ext.vision.architecture import MambaVision

    return MambaVision(**model).num_parameters()


def spread(values: list[float]) -> str:
    """Percent: the mean, and the least and the largest of the seeds."""
    return f"{100 * np.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def page(report: dict[str, Any]) -> str:
    """The results as a page."""
    seeds = report["seeds"]
    lines = ["# A halved image classifier", "", f"Top-1 on {HELD_OUT} held-out digits, percent: the mean of "]
    lines[-1] += f"{len(seeds)} seeds (least to largest). {report['steps']} steps of {BATCH} images for the teacher, "
    lines[-1] += f"{report['few']} for what was cut out of it. {report['machine']}, {report['date']}."
    lines += [
        "",
        f"The teacher, {report['parameters']:,} parameters: {spread([s['teacher']['top_1'] for s in seeds])}.",
    ]
    lines += ["", "| cut to half by | parameters | at once | labels | teacher's logits | random weights, labels |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for name in CUTS:
        own = [seed[name] for seed in seeds]
        arms = ("at once", "labels", "teacher's logits", "random weights, labels")
        cells = [spread([each[arm]["top_1"] for each in own]) for arm in arms]
        lines.append(f"| {name} | {np.mean([each['parameters'] for each in own]):,.0f} | {' | '.join(cells)} |")
    lines += ["", "The teacher's logits above the labels alone, seed by seed, points:", ""]
    for name in CUTS:
        above = [100 * (s[name]["teacher's logits"]["top_1"] - s[name]["labels"]["top_1"]) for s in seeds]
        lines.append(f"- {name}: {', '.join(f'{value:+.1f}' for value in above)}")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of images, runs and their logs")
    sizes = {"steps": 300, "few": 40, "seeds": 3}
    arguments = machine.sized_arguments(parser, sizes, {"steps": 4, "few": 2, "seeds": 1})
    out = arguments.out.resolve()
    if not (out / "valid").is_dir():
        write_images(out)
    report = machine.describe() | {"steps": arguments.steps, "few": arguments.few}
    report["seeds"] = [measure(out, seed, arguments.steps, arguments.few) for seed in range(1, arguments.seeds + 1)]
    from megatron_ext.vision.presets import PRESETS

    report["parameters"] = PRESETS["mambavision-nano"].num_parameters()
    machine.write(report, "vision_compression_cpu", page(report), out if arguments.quick else None)


if __name__ == "__main__":
    main()
