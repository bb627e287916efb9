"""Where attention belongs, and which mixer: MambaVision's ablations in miniature, equal parameters, paired by seed.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/vision_claims.py [--size cpu|gpu]

Networks whose eight blocks of one stage are ordered in seven ways, and the published order with the mixer's four arms,
answer five questions about procedural scenes (`vision_scenes.py`), each trained on the same scenes in the same order
for a seed. MLPs are as wide as it takes for all to have equally many parameters. Then the published order on scikit-
learn's digits. Writes results/vision_claims_{cpu,gpu}.{json,md,png}; each training's numbers are kept in --out and used
again. `cpu` is made for 12 minutes on two idle cores, `gpu`, 64 x 64 pixels and 1.3M parameters, for 5 on an H100.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import vision_scenes as scenes
from machine import describe, write

from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.network import Network

PUBLISHED = "MMMMSSSS"
PATTERNS = (PUBLISHED, "SSSSMMMM", "MSMSMSMS", "SMSMSMSM", "MMMMMMSS", "MMMMMMMM", "SSSSSSSS")
MIXERS = ("causal", "one-branch", "gated")  # beside `concatenated`, the published one
ARMS = {name: (name, "concatenated") for name in PATTERNS} | {name: (PUBLISHED, name) for name in MIXERS}
MEAN = "mean"


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        side: Of the images.
        dim: Channels of the first stage; the one that is looked at has twice as many.
        head_dim: Channels of an attention head.
        batch: Scenes of a step.
        steps: Of a training.
        measured: Scenes that it is measured on.
        processes: Trainings at once.
        device: Where.
    """

    side: int
    dim: int
    head_dim: int
    batch: int
    steps: int
    measured: int
    processes: int
    device: str = "cpu"


SIZES = {
    "cpu": Size(side=32, dim=16, head_dim=16, batch=32, steps=600, measured=4000, processes=2),
    "gpu": Size(64, dim=40, head_dim=16, batch=256, steps=1000, measured=20_000, processes=8, device="cuda"),
    "quick": Size(side=32, dim=8, head_dim=8, batch=8, steps=3, measured=50, processes=1),
}


def network(arm: str, size: Size) -> MambaVision:
    """An arm, with MLPs as wide as makes its parameters closest to those of the published order."""
    pattern, mixer = ARMS[arm]
    model = MambaVision(
        pattern=f"C/{pattern}//", dim=size.dim, stem=16, head_dim=size.head_dim, window=size.side // 8,
        mixer=mixer, resolution=size.side, classes=scenes.ANSWERS,
    )  # fmt: skip
    wanted, channels = replace(model, pattern=f"C/{PUBLISHED}//", mixer="concatenated").num_parameters(), 2 * size.dim
    widths = (replace(model, mlp_ratio=hidden / channels) for hidden in range(2 * channels, 8 * channels))
    return min(widths, key=lambda own: abs(own.num_parameters() - wanted))


def train(task: tuple[str, int], size: Size, out: Path) -> dict[str, Any]:
    """Train an arm with a seed, unless that is done, and measure it: shares of right answers by question."""
    arm, seed = task
    path = out / f"{arm}-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    model, generator = network(arm, size), torch.Generator(size.device).manual_seed(1000 + seed)
    torch.manual_seed(seed)
    net = Network(model).to(size.device)
    optimizer, schedule = _optimizer(net, size.steps)
    begun, losses = time.perf_counter(), []
    for _ in range(size.steps):
        images, answers = scenes.draw(size.batch, size.side, generator)
        loss = sum(F.cross_entropy(logits, answers[name]) for name, logits in _asked(net(images)).items())
        _step(net, optimizer, schedule, loss)  # type: ignore[arg-type]
        losses.append(loss.item())  # type: ignore[union-attr]
    seconds = time.perf_counter() - begun
    net.eval()
    generator, right = torch.Generator(size.device).manual_seed(1), dict.fromkeys(scenes.QUESTIONS, 0)
    batches = -(-size.measured // 500)
    for _ in range(batches):
        images, answers = scenes.draw(500, size.side, generator)
        with torch.no_grad():
            for name, logits in _asked(net(images)).items():
                right[name] += int((logits.argmax(-1) == answers[name]).sum())
    accuracy = {name: count / (500 * batches) for name, count in right.items()}
    found = {
        "arm": arm, "seed": seed, "parameters": model.num_parameters(), "seconds": round(seconds, 1),
        "loss": statistics.mean(losses[-20:]), "accuracy": {MEAN: statistics.mean(accuracy.values()), **accuracy},
    }  # fmt: skip
    path.write_text(json.dumps(found))
    print(f"{arm} {seed}: {found['accuracy'][MEAN]:.3f} after {seconds:.0f} s", flush=True)
    return found


def digits(seed: int, epochs: int, out: Path) -> float:
    """The share of held-out digits that the smallest preset learns to tell."""
    from sklearn.datasets import load_digits

    path = out / f"digits-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    data = load_digits()
    images = F.interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, scale_factor=4)
    labels = torch.tensor(data.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(labels))
    held, rest = order[:360], order[360:]
    model = MambaVision(
        pattern="C/C/MMSS/MS", dim=16, stem=16, head_dim=16, window=4, last_window=2, state=4, resolution=32,
        image_channels=1, classes=10,
    )  # fmt: skip
    net = Network(model)
    optimizer, schedule = _optimizer(net, epochs * (len(rest) // 64))
    for _ in range(epochs):
        for batch in rest[torch.randperm(len(rest))].split(64)[: len(rest) // 64]:
            _step(net, optimizer, schedule, F.cross_entropy(net(images[batch]), labels[batch]))
    net.eval()
    with torch.no_grad():
        found = (net(images[held]).argmax(1) == labels[held]).double().mean().item()
    path.write_text(json.dumps(found))
    return found


def _optimizer(net: Network, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, max(2, steps), pct_start=0.1)


def _step(net: Network, optimizer: torch.optim.Optimizer, schedule: Any, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
    optimizer.step()
    schedule.step()


def _asked(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits by question."""
    return dict(zip(scenes.QUESTIONS, logits.float().split(list(scenes.QUESTIONS.values()), -1), strict=True))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95% interval, by Student's t."""
    from scipy.stats import t

    if len(values) < 2:
        return values[0], float("nan")
    return statistics.mean(values), float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def against(rows: Sequence[dict], arm: str, other: str, question: str = MEAN) -> tuple[float, float]:
    """How much better an arm is than another, seed by seed: the mean and half of its interval."""
    by_seed = [{row["seed"]: row["accuracy"][question] for row in rows if row["arm"] == name} for name in (arm, other)]
    return interval([by_seed[0][seed] - by_seed[1][seed] for seed in sorted(by_seed[0])])


def claims(rows: Sequence[dict]) -> dict[str, str]:
    """What the paper says, and whether it held here."""
    better = {
        "the published order is better than attention first": (PUBLISHED, ["SSSSMMMM"]),
        "than turns of both": (PUBLISHED, ["MSMSMSMS", "SMSMSMSM"]),
        "than attention in the last quarter alone": (PUBLISHED, ["MMMMMMSS"]),
        "than no attention": (PUBLISHED, ["MMMMMMMM"]),
        "than attention alone": (PUBLISHED, ["SSSSSSSS"]),
        "two branches side by side are better than their product": (PUBLISHED, ["gated"]),
        "a convolution in the second branch is better than none": ("gated", ["one-branch"]),
        "a convolution that sees both sides is better than a causal one": ("one-branch", ["causal"]),
    }
    return {claim: _verdict(rows, arm, others) for claim, (arm, others) in better.items()}


def _verdict(rows: Sequence[dict], arm: str, others: Sequence[str]) -> str:
    found = {other: against(rows, arm, other) for other in others}
    numbers = ", ".join(
        f"{100 * gain:+.1f} ± {100 * half:.1f} points over {name}" for name, (gain, half) in found.items()
    )
    if all(gain > half for gain, half in found.values()):
        return f"held: {numbers}"
    wrong = [name for name, (gain, half) in found.items() if -gain > half]
    return f"did not hold ({'the other way round' if wrong else 'within the spread of seeds'}): {numbers}"


def markdown(report: dict[str, Any]) -> str:
    """The table, and the claims."""
    rows, size = report["rows"], report["settings"]
    questions = [MEAN, *scenes.QUESTIONS]
    device = report["machine"] if size["device"] == "cpu" else report["device"]
    counts = sorted({row["parameters"] for row in rows})
    lines = [
        f"Right answers about scenes of {size['side']} x {size['side']} pixels after {size['steps']} steps of "
        f"{size['batch']}, percent with 95% intervals over {len(report['seeds'])} seeds; {counts[0]:,} to "
        f"{counts[-1]:,} parameters, {device}. The last column is paired by seed.", "",
        "| arm | " + " | ".join(questions) + f" | over {PUBLISHED} |", "|---|" + "---:|" * (len(questions) + 1),
    ]  # fmt: skip
    for arm in ARMS:
        cells = []
        for question in questions:
            middle, half = interval([row["accuracy"][question] for row in rows if row["arm"] == arm])
            cells.append(f"{100 * middle:.1f} ± {100 * half:.1f}")
        gain, half = against(rows, arm, PUBLISHED)
        cells.append("" if arm == PUBLISHED else f"{100 * gain:+.1f} ± {100 * half:.1f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    chance = ", ".join(f"{name} {100 / count:.0f}" for name, count in scenes.QUESTIONS.items())
    lines += ["", f"Chance: {chance}.", ""]
    lines += [f"- {claim}: {verdict}." for claim, verdict in report["claims"].items()]
    middle, half = interval(report["digits"])
    verdict = "held" if min(report["digits"]) > 0.97 else "did not hold"
    lines.append(
        f"- scikit-learn's digits are learned to more than 97%: {verdict}: {100 * middle:.1f} ± {100 * half:.1f}%, "
        f"at least {100 * min(report['digits']):.1f}%."
    )
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Gains over the published order by seed with their intervals, and the accuracy of each question by seed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from megatron_ext.reports.figures import COLORS, GREY, STYLE, save

    rows, arms = report["rows"], list(ARMS)
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        gains, answers = figure.subplots(1, 2, width_ratios=[1, 1.25])
        for place, arm in enumerate(arms):
            own = {row["seed"]: row["accuracy"][MEAN] for row in rows if row["arm"] == arm}
            base = {row["seed"]: row["accuracy"][MEAN] for row in rows if row["arm"] == PUBLISHED}
            points = [100 * (own[seed] - base[seed]) for seed in own]
            middle, half = interval(points)
            gains.plot(points, [place] * len(points), "o", color=COLORS["distilled"], alpha=0.35, markersize=4)
            if arm != PUBLISHED:
                gains.errorbar(middle, place, xerr=half, color=COLORS["distilled"], marker="D", markersize=5, capsize=3)
        gains.axvline(0, color=GREY, linewidth=1)
        gains.set(yticks=range(len(arms)), yticklabels=arms, ylim=(len(arms) - 0.5, -0.5))
        gains.set_xlabel(f"points over {PUBLISHED}, paired by seed, 95% intervals")
        gains.set_title("right answers, mean of all questions")
        palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
        for number, (question, color) in enumerate(zip(scenes.QUESTIONS, palette, strict=True)):
            points = [(100 * row["accuracy"][question], arms.index(row["arm"]) + 0.14 * (number - 2)) for row in rows]
            answers.plot(*zip(*points, strict=True), "o", color=color, alpha=0.6, markersize=4, label=question)
        answers.set(yticks=range(len(arms)), yticklabels=[], ylim=(len(arms) - 0.5, -0.5), xlim=(0, 102))
        answers.set_xlabel("percent")
        answers.set_title("by question, each seed")
        answers.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        save(figure, path)


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="cpu", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="default: %(default)s")
    parser.add_argument("--processes", type=int, help="trainings at once; by default the size's")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_vision"), help="default: %(default)s")
    parser.add_argument("--only-train", action="store_true", help="write no report: another start has other seeds")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    if size.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --size cpu")
    report, seeds = describe(), arguments.seeds
    if size.device == "cuda":
        report["device"] = torch.cuda.get_device_name()
    out = arguments.out / arguments.size
    out.mkdir(parents=True, exist_ok=True)
    tasks = [(arm, seed) for seed in seeds for arm in ARMS]
    with get_context("spawn").Pool(arguments.processes or size.processes) as pool:
        found = pool.map_async(partial(train, size=size, out=out), tasks, chunksize=1)
        told = pool.map_async(partial(digits, epochs=12 if size.steps > 100 else 1, out=out), seeds, chunksize=1)
        report["rows"], report["digits"] = found.get(), told.get()
    if arguments.only_train:
        return
    report |= {
        "training_seconds": round(sum(row["seconds"] for row in report["rows"])), "seeds": seeds,
        "settings": asdict(size), "claims": claims(report["rows"]),
    }  # fmt: skip
    folder = arguments.out if arguments.size == "quick" else Path(__file__).parent / "results"
    write(report, f"vision_claims_{arguments.size}", markdown(report), folder)
    plot(report, folder / f"vision_claims_{arguments.size}.png")


if __name__ == "__main__":
    main()
