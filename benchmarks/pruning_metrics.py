"""What a small model loses when it is cut by each metric of importance, before any retraining.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/pruning_metrics.py

A hybrid model is trained on the Python standard library, with one sequence in five of words that repeat, so that it
can also copy. It is then loaded once; all scores come from training text, all results from held-out text and from
questions it has not seen: "continue this list of words, whose beginning comes again". Sub-layers are left out in place
and FFN neurons are silenced, which gives what the cut checkpoint gives; two cells are checked against one.
Writes results/pruning_metrics.{json,md}; what is trained is kept in --out and used again.
"""

import argparse
import contextlib
import itertools
import random
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import small_model
import torch
from machine import describe, sized_arguments, write
from pruning_metrics_report import markdown
from small_model import BATCH, SEQUENCE
from torch import Tensor

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.errors import PlanError
from megatron_ext.inference.loglikelihood import LoglikelihoodRequest
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP
from megatron_ext.pruning import job, leave_out
from megatron_ext.pruning import scores as score_names
from megatron_ext.pruning.ablation import Ablation, Passes
from megatron_ext.pruning.apply import apply
from megatron_ext.pruning.budget import Targets
from megatron_ext.pruning.depth import BlockInfluence
from megatron_ext.pruning.depth_metrics import DEPTH_METRICS, Scan
from megatron_ext.pruning.importance import Importance, WidthMetric
from megatron_ext.pruning.magnitude import magnitudes
from megatron_ext.pruning.scores import Scores
from megatron_ext.pruning.select import keep_units, make_plan
from megatron_ext.reports.metrics_file import read_metrics
from megatron_ext.training.command_line import parse_command_line
from megatron_ext.training.forward import forward_all, forward_sums, load_model, load_other, micro_batches
from megatron_ext.training.job import Job

KINDS = {"layers": "", "attention": ATTENTION, "FFN": MLP, "Mamba": MAMBA}
FRACTIONS = (1 / 8, 1 / 4, 3 / 8, 1 / 2)  # of the units of a kind; those that are no whole number are left out
USUAL = "activation, mean over tokens, l2 over samples"


class Bench:
    """The trained model, loaded once, with its text and its questions."""

    def __init__(self, out: Path, model: Path, arguments: argparse.Namespace) -> None:
        from megatron.core.utils import unwrap_model

        from megatron_ext.inference.sharded import ShardedModel

        flags = [
            *small_model.data_flags(out, BATCH),
            "--data-path",
            str(out / "text" / "text_document"),
            "--load",
            str(model),
        ]
        self.run = parse_command_line(Job("benchmark", defaults=job.JOB.defaults), flags)
        self.path, self.arch, self.samples = model, self.run.architecture, arguments.samples
        self.model = load_model(self.run)
        self.chunks = unwrap_model(self.model)
        tokenizer = out / "text" / "tokenizer"
        self.text = {split: micro_batches(self.run, self.model, split, self.samples) for split in ("train", "valid")}
        self.asked = {
            split: [
                LoglikelihoodRequest([*sample.prompt, *sample.answer], len(sample.prompt))
                for sample in small_model.questions(tokenizer, arguments.questions, seed)
            ]
            for split, seed in (("train", 2), ("valid", 3))
        }
        self.sharded = ShardedModel(self.chunks, self.arch, self.arch.padded_vocab_size)

    def loss(self, split: str) -> float:
        """Nats per token of text."""
        return forward_all(self.run, self.model, [iter(self.text[split][0])], self.samples // BATCH)["loss"]

    def passes(self, split: str) -> Passes:
        """Text for `Ablation`."""

        def run(begin: int, end: int) -> tuple[float, float]:
            return forward_sums(self.run, self.model, [iter(self.text[split][0][begin:end])], end - begin)["loss"]

        return Passes(run, len(self.text[split][0]), self.run.args.micro_batch_size * SEQUENCE)

    def answers(self, split: str) -> tuple[float, float]:
        """The share of the questions that are answered right, and nats per token of the answers."""
        from megatron_ext.inference.score import score as scored

        found = [score for _, score in scored(self.sharded, self.asked[split], BATCH * SEQUENCE)]
        right = statistics.fmean(score.all_greedy for score in found)
        return right, -sum(score.total for score in found) / sum(len(score.greedy) for score in found)


class Left:
    """What is left without some sub-layers, on text and on questions."""

    def __init__(self, bench: Bench, split: str) -> None:
        self.ablation = Ablation(bench.chunks, bench.arch, bench.passes(split), logits=True)
        self._ask = lambda: bench.answers(split)
        self._answers: dict[frozenset[int], tuple[float, float]] = {}

    def without(self, units: Iterable[int]) -> dict[str, float]:
        """Loss on text, share of the questions answered right, loss of the answers."""
        dropped = frozenset(units)
        if dropped not in self._answers:
            with self.ablation.without(dropped):
                self._answers[dropped] = self._ask()
        right, answer_loss = self._answers[dropped]
        return {"loss": self.ablation.outcome(dropped).loss, "right": right, "answer_loss": answer_loss}


def score(bench: Bench, arguments: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """All depth scores, and the width scores by metric, on training text."""
    aggregations = ("mean", "l2", "var")
    metrics = {f"activation, {s} over tokens, {b} over samples": WidthMetric("activation", b, s)
               for s in aggregations for b in aggregations}  # fmt: skip
    metrics["weight times activation (Wanda)"] = WidthMetric("wanda")
    hooks = {name: Importance(bench.chunks, bench.arch, metric) for name, metric in metrics.items()}
    influence = BlockInfluence(bench.chunks, bench.arch)
    with torch.no_grad():
        bench.loss("train")
    for hook in (*hooks.values(), influence):
        hook.remove()
    depth = influence.gather()
    assert depth is not None
    width = {name: hook.gather() or {} for name, hook in hooks.items()}
    width["weight magnitude"] = magnitudes(CheckpointReader(bench.path), bench.arch)

    left = Left(bench, "train")
    count = len(bench.arch.layers.blocks)
    wanted = [("logit_mse", blocks, 0) for blocks in (True, False)]
    wanted += [(f"scan_{value}", True, run) for value in ("loss", "task") for run in runs(count)]
    wanted += [(f"shapley_{value}", blocks, 0) for blocks in (True, False) for value in ("loss", "logit_distance")]
    for metric, blocks, run in wanted:
        started = time.monotonic()
        if metric == "scan_task":
            judge = lambda: bench.answers("train")[0]  # noqa: E731
            depth |= leave_out.scan_task(left.ablation, bench.arch, judge, judge(), blocks=blocks, run=run)
        else:
            depth |= leave_out.measure(
                left.ablation, bench.arch, metric, blocks=blocks, run=run,
                sampling=leave_out.ShapleySampling(max_samples=arguments.shapley_samples),
            )  # fmt: skip
        what = "blocks" if blocks else "sub-layers"
        print(f"scored {metric} of {what} {run or ''}: {time.monotonic() - started:.0f} s", flush=True)
    left.ablation.remove()
    return depth, width


def runs(count: int) -> list[int]:
    """How many of so many units the fractions remove, where that is a whole number."""
    return [int(share * count) for share in FRACTIONS if share * count == int(share * count)]


def drop(bench: Bench, values: dict[str, Tensor], kind: str, metric: str, count: int) -> list[int]:
    """The sub-layers that the package's own selection drops."""
    arch, given = bench.arch, Scores(values=values, architecture=bench.arch)
    if kind == "layers":
        targets = Targets(num_layers=len(arch.layers.blocks) - count, depth_metric=metric)
    else:
        names = {"attention": "attention_layers", "FFN": "mlp_layers", "Mamba": "mamba_layers"}
        left = len(arch.layers.indices(KINDS[kind])) - count
        targets = Targets(**{names[kind]: left}, depth_metric=metric)  # type: ignore[arg-type]
    targets.check(arch)
    kept = keep_units(given, arch, targets)
    return [i for i in range(len(arch.pattern)) if i not in kept]


def removed(arch: Architecture, units: Iterable[int]) -> int:
    """Parameters of these sub-layers."""
    gone = set(units)
    rest = replace(arch, pattern="".join(kind for i, kind in enumerate(arch.pattern) if i not in gone))
    return arch.num_parameters() - rest.num_parameters()


def cut_depth(bench: Bench, left: Left, depth: dict[str, Tensor], arguments: argparse.Namespace) -> list[dict]:
    """One row for each kind of unit, number removed, and metric."""
    rows = []
    for kind in KINDS:
        units = [list(block) for block in bench.arch.layers.blocks]
        if kind != "layers":
            units = [[i] for i in bench.arch.layers.indices(KINDS[kind])]
        for count in runs(len(units)):
            where = {"kind": kind, "removed": count, "of": len(units), "fraction": count / len(units)}
            single = [name for name, metric in DEPTH_METRICS.items() if not isinstance(metric, Scan)]
            chosen = {metric: drop(bench, depth, kind, metric, count) for metric in single}
            if kind == "layers":
                for metric in ("scan_loss", "scan_task"):
                    with contextlib.suppress(PlanError):  # a model of few steps answers nothing, whatever is left out
                        chosen[metric] = drop(bench, depth, kind, metric, count)
            for metric, dropped in chosen.items():
                found = left.without(dropped)
                rows.append(
                    {**where, "metric": metric, "dropped": dropped, "parameters": removed(bench.arch, dropped), **found}
                )
            every = list(itertools.combinations(units, count))
            if len(every) > arguments.choices:
                every = random.Random(4).sample(every, arguments.choices)
            sets = [[i for unit in choice for i in unit] for choice in every]
            outcomes = [left.without(dropped) for dropped in sets]
            mean = {name: statistics.mean(outcome[name] for outcome in outcomes) for name in outcomes[0]}
            spread = statistics.pstdev(outcome["loss"] for outcome in outcomes)
            size = statistics.mean(removed(bench.arch, dropped) for dropped in sets)
            rows.append(
                {**where, "metric": "random", "choices": len(sets), "spread": spread, "parameters": size, **mean}
            )
            best = min(range(len(sets)), key=lambda i: outcomes[i]["loss"])
            rows.append(
                {**where, "metric": "best", "dropped": sets[best], "parameters": removed(bench.arch, sets[best])}
                | outcomes[best]
            )
            print(f"cut {count} of {len(units)} {kind}: {len(sets)} choices", flush=True)
    return rows


@contextlib.contextmanager
def silenced(bench: Bench, kept: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Only these FFN neurons of each MLP."""
    handles = []
    for layer in bench.chunks[0].decoder.layers:
        if (index := layer.layer_number - 1) in kept:
            mask = torch.zeros(bench.arch.at(index).ffn_hidden_size)
            mask[list(kept[index])] = 1
            hook = lambda _, inputs, mask=mask: (inputs[0] * mask, *inputs[1:])  # noqa: E731
            handles.append(layer.mlp.linear_fc2.register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def cut_width(bench: Bench, width: dict[str, dict[str, Tensor]], draws: int) -> list[dict]:
    """One row for each width metric and fraction of the FFN's neurons."""
    rows = []
    draw = torch.Generator().manual_seed(5)
    size = bench.arch.ffn_hidden_size
    mlps = bench.arch.layers.indices(MLP)
    for fraction in (0.25, 0.5):
        for metric, values in [*width.items(), ("random", {})]:
            losses, answers = [], []
            for _ in range(1 if values else draws):
                own = values or {score_names.ffn(i): torch.rand(size, generator=draw) for i in mlps}
                targets = Targets(ffn_hidden_size=round(size * (1 - fraction)))
                plan = make_plan(Scores(values=own, architecture=bench.arch), bench.arch, targets)
                with silenced(bench, plan.ffn):
                    losses.append(bench.loss("valid"))
                    answers.append(bench.answers("valid")[1])
            row = {"fraction": fraction, "metric": metric, "loss": statistics.mean(losses)}
            row["answer_loss"] = statistics.mean(answers)
            rows.append(row | ({} if values else {"choices": draws, "spread": statistics.pstdev(losses)}))
    return rows


def check(bench: Bench, depth: dict[str, Tensor], width: dict[str, Tensor], rows: dict[str, list[dict]], name: str):
    """Two cells against real checkpoints: half the layers by Block Influence, half the FFN by the default metric."""
    arch, checked = bench.arch, {}
    cuts = {
        "depth": (depth, Targets(num_layers=len(arch.layers.blocks) // 2)),
        "width": (width, Targets(ffn_hidden_size=arch.ffn_hidden_size // 2)),
    }
    said = {
        "depth": row_of(rows["depth"], kind="layers", fraction=0.5, metric="block_influence")["loss"],
        "width": row_of(rows["width"], fraction=0.5, metric=name)["loss"],
    }
    for what, (values, targets) in cuts.items():
        path = bench.path.parent / f"cut-{what}"
        shutil.rmtree(path, ignore_errors=True)
        plan = make_plan(Scores(values=values, architecture=arch), arch, targets)
        apply(plan, bench.path, path)
        other, model = load_other(bench.run, plan.target, path)
        with torch.no_grad():
            real = forward_all(other, model, [iter(bench.text["valid"][0])], bench.samples // BATCH)["loss"]
        checked[what] = {"in_place": said[what], "checkpoint": real}
    return checked


def row_of(rows: list[dict], **where: Any) -> dict:
    """The row with these entries."""
    (found,) = [row for row in rows if all(row[name] == value for name, value in where.items())]
    return found


def measure(out: Path, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, as it goes into the JSON."""
    started = time.monotonic()
    bench = Bench(out, model, arguments)
    depth, width = score(bench, arguments)
    left = Left(bench, "valid")
    whole = left.without(())
    rows = {"depth": cut_depth(bench, left, depth, arguments)}
    left.ablation.remove()
    rows["width"] = cut_width(bench, width, arguments.draws)
    history = read_metrics(model / "metrics.jsonl")
    return {
        "what": "loss on held-out text after cutting, before any retraining",
        "training": {
            "steps": arguments.train_iters,
            "tokens": int(history[-1]["tokens"]),
            "seconds": round(sum(step["seconds"] for step in history)),
            "share_of_lists": small_model.SHARE,
        },
        "model": bench.arch.to_dict() | {"parameters": bench.arch.num_parameters()},
        "settings": {
            "sequence": SEQUENCE, "held_out_sequences": arguments.samples, "scoring_sequences": arguments.samples,
            "questions": arguments.questions, "shapley_samples": arguments.shapley_samples,
            "question": small_model.QUESTION,
        },
        "whole": whole,
        "depth": rows["depth"],
        "width": rows["width"],
        "checked": check(bench, depth, width[USUAL], rows, USUAL),
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_model"), help="data and model (%(default)s)")
    sizes = {"train-iters": 1500, "samples": 32, "questions": 64, "shapley-samples": 8, "choices": 70, "draws": 5}
    quick = {"train-iters": 20, "samples": 8, "questions": 8, "shapley-samples": 2, "choices": 4, "draws": 2}
    arguments = sized_arguments(parser, sizes, quick)
    machine = describe()
    model = small_model.train(arguments.out, arguments.train_iters)
    report = machine | measure(arguments.out, model, arguments)
    write(report, "pruning_metrics", markdown(report), arguments.out if arguments.quick else None)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
