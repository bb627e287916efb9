"""Training a model of the size of SmolLM2-135M on a CPU: a step of ours beside transformers' of the same weights.

    python benchmarks/real_model_cpu.py [--cases fp32-512 ...] [--threads 1] [--rounds 7]

30 blocks, 576 channels, 9 heads in 3 groups, an MLP of 1,536, 49,152 words, output tied to the embedding: random
weights, made by transformers and converted, and the same random tokens for both, whose first losses must agree. Each
trains in a process of its own, and a step of one follows a step of the other. Ours is `pretrain_hybrid.py`'s loop;
theirs is `LlamaForCausalLM` with torch's scaled-dot-product attention, its own loss, clipped gradients and torch's
fused AdamW. In bf16 theirs has nothing else: ours adds gradients up in fp32, and keeps weights in fp32 for Adam.

Figures: seconds of forward with backward, and of whole steps, medians; ratios are medians over pairs. One thread is
measured by CPU time, which other programs on the machine disturb less, several by wall time.
Writes results/real_model_cpu.json and .md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import torch

LAYERS, VOCABULARY = 30, 49152
CASES = {
    "fp32-512": ("fp32", 512, 2),
    "fp32-1024": ("fp32", 1024, 1),
    "bf16-512": ("bf16", 512, 2),
    "bf16-1024": ("bf16", 1024, 1),
}
WARM_UP, TOLERANCE = 2, {"fp32": 1e-5, "bf16": 1e-2}
clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter


def make_model(folder: Path, layers: int, vocabulary: int) -> None:
    """A Hugging Face directory with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_theta=100000.0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def tokens_of(number: int, batch: int, length: int, vocabulary: int) -> torch.Tensor:
    """The tokens of a step, with the last label (batch, length + 1)."""
    return torch.randint(vocabulary, (batch, length + 1), generator=torch.Generator().manual_seed(number))


class Turns:
    """The other end of a process that takes a step when it is told."""

    def __init__(self, script: str, arguments: list[str], threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        environment.setdefault("PYTHONPATH", str(Path(script).resolve().parents[1]))
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, script, *arguments], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True,
        )  # fmt: skip

    def step(self) -> dict[str, float]:
        """One step; what it says of itself."""
        self.process.stdin.write("\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        for line in self.process.stdout:  # type: ignore[union-attr]
            if line.startswith("STEP "):
                return json.loads(line[5:])
        self.log.seek(0)
        raise SystemExit(self.log.read()[-6000:])

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()


def say(**found: float) -> None:
    """Tell the parent, and wait for its next word."""
    print("STEP " + json.dumps(found), flush=True)
    wait()


def wait() -> None:
    """Wait for the parent's word."""
    if not sys.stdin.readline():
        sys.exit()


def theirs(model: Path, precision: str, length: int, batch: int, vocabulary: int) -> None:
    """Steps of transformers, for ever."""
    from transformers import LlamaForCausalLM

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network = LlamaForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    wait()
    number = 0
    while True:
        tokens = tokens_of(number, batch, length, vocabulary)
        begun = clock()
        given = tokens[:, :-1].contiguous()
        found = network(input_ids=given, labels=given, shift_labels=tokens[:, 1:].contiguous(), use_cache=False)
        found.loss.backward()
        passed = clock()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        say(
            passes=passed - begun,
            step=clock() - begun,
            loss=float(found.loss.detach()),
            peak=machine.peak_memory(),
        )
        number += 1


def ours(model: Path, precision: str, length: int, batch: int, vocabulary: int) -> None:
    """Steps of the loop that `pretrain_hybrid.py` runs."""
    from megatron_ext.training.command_line import parse_command_line
    from megatron_ext.training.job import Job

    flags = ["--pretrained-checkpoint", str(model), "--seq-length", str(length), "--micro-batch-size", str(batch)]
    flags += ["--global-batch-size", str(batch), "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size"]
    flags += [str(vocabulary - 1), "--lr", "1e-4", "--train-iters", "100000", "--eval-iters", "0", "--log-interval"]
    flags += ["1000000", "--max-position-embeddings", "8192", *["--bf16"] * (precision == "bf16")]
    started = parse_command_line(Job("pretrain"), flags)
    import megatron.training.training as training

    from megatron_ext.training import loop
    from megatron_ext.training.step import language_modelling

    task, state = language_modelling(started.args), {"number": -1, "begun": 0.0, "passed": 0.0, "loss": 0.0}
    choose = training.get_forward_backward_func

    def given() -> Iterator[dict[str, torch.Tensor]]:
        tokens = tokens_of(state["number"], batch, length, vocabulary)
        positions = torch.arange(length).expand(batch, -1)
        mask = torch.ones(batch, length)
        yield {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions, "loss_mask": mask}

    def timed(*args: Any, **kwargs: Any) -> Any:
        schedule = choose(*args, **kwargs)

        def run(**rest: Any) -> Any:
            if state["number"] >= 0:
                say(
                    passes=state["passed"],
                    step=clock() - state["begun"],
                    loss=state["loss"],
                    peak=machine.peak_memory(),
                )
            else:
                wait()
            state["number"] += 1
            data = given()
            state["begun"] = clock()
            found = schedule(**rest | {"data_iterator": data})
            state["passed"] = clock() - state["begun"]
            total, count = found[0]["lm loss"].tolist()
            state["loss"] = total / count
            return found

        return run

    training.get_forward_backward_func = timed
    loop.train(started, replace(task))


def measure(model: Path, exported: Path, case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Pairs of steps in turns."""
    precision, length, batch = CASES[case]
    sizes = [precision, str(length), str(batch), str(args.vocabulary)]
    sides = {
        "ours": Turns(__file__, ["--child", "ours", str(model), *sizes], args.threads),
        "transformers": Turns(__file__, ["--child", "theirs", str(exported), *sizes], args.threads),
    }
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    try:
        for number in range(args.rounds + WARM_UP):
            for name in sides if number % 2 else reversed(sides):
                steps[name].append(sides[name].step())
            print(
                {k: {a: round(b, 4) for a, b in v[-1].items()} for k, v in steps.items()}, file=sys.stderr, flush=True
            )
    finally:
        for side in sides.values():
            side.end()
    losses = [steps[name][0]["loss"] for name in sides]
    if abs(losses[0] / losses[1] - 1) > TOLERANCE[precision]:
        raise SystemExit(f"{case}: the first losses differ: {losses}")
    found: dict[str, Any] = {"precision": precision, "tokens": length * batch, "length": length, "first_losses": losses}
    for what in ("passes", "step"):
        times = {name: [each[what] for each in own[WARM_UP:]] for name, own in steps.items()}
        pairs = [b / a for a, b in zip(*times.values(), strict=True)]
        found[what] = {name: statistics.median(own) for name, own in times.items()}
        found[what] |= {"ratio": statistics.median(pairs), "slowest_pair": min(pairs), "fastest_pair": max(pairs)}
    found["peak_bytes"] = {name: own[-1]["peak"] for name, own in steps.items()}
    return found


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--child"]:
        kind, model, precision, length, batch, vocabulary = sys.argv[2:]
        side = ours if kind == "ours" else theirs
        side(Path(model), precision, int(length), int(batch), int(vocabulary))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--models", type=Path, help="folder in which the two forms of the model are made, and kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = args.models or Path(folder)
        exported, model = models / "huggingface", models / "megatron"
        if not model.exists():
            make_model(exported, args.layers, args.vocabulary)
            convert = [sys.executable, "-m", "megatron_ext", "convert", "--from", "hf", "--to", "megatron"]
            subprocess.run([*convert, str(exported), str(model)], check=True)
        cases: dict[str, Any] = {}
        for case in args.cases:
            cases[case] = measure(model, exported, case, args)
            write(args, cases)  # after each, because the next one may not come


def write(args: argparse.Namespace, cases: dict[str, Any]) -> None:
    """Write what has been measured so far."""
    sizes = {name: getattr(args, name) for name in ("layers", "vocabulary", "threads", "rounds")}
    report = {
        "what": "a 135M Llama model on a CPU: transformers' time over ours",
        **machine.describe(),
        "device": "CPU",
        "sizes": sizes,
        "cases": cases,
    }
    lines = [
        "| | forward + backward: ours | transformers | ratio (of a pair) | step: ours | transformers | ratio | GB |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, case in cases.items():
        a, b, peak = case["passes"], case["step"], case["peak_bytes"]
        lines.append(
            f"| {name} x {case['tokens'] // case['length']} | {a['ours']:.2f} s | {a['transformers']:.2f} s | "
            f"{a['ratio']:.2f}x ({a['slowest_pair']:.2f} to {a['fastest_pair']:.2f}) | {b['ours']:.2f} s | "
            f"{b['transformers']:.2f} s | {b['ratio']:.2f}x | "
            f"{peak['ours'] / 1e9:.1f}, {peak['transformers'] / 1e9:.1f} |"
        )
    machine.write(report, "real_model_cpu", "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
