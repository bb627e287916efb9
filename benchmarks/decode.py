"""One more token at a growing context: tokens/s and cache bytes of a Transformer, a hybrid and Mamba-2 of equal size.

    python benchmarks/decode.py [--batch 1] [--contexts 1024 4096 16384 65536 131072]

The layers are built from their architectures with random weights and no more than one token's work: projections, cached
attention (torch's), the two Mamba-2 steps (`mamba_ssm_api`), MLPs and output layer. Single steps are timed on caches of
the given length, on a GPU as a CUDA graph. The Transformer comes with full multi-head attention and with grouped query
heads, because what a hybrid gains depends on which. Beside each figure stands the roofline: the bytes that
`models/cost.py` counts, at the bandwidth of a copy measured in the same run. Models take turns, `--rounds` times each;
medians over the rounds. On a GPU bf16 and about 8B parameters, what does not fit is said; on a CPU fp32, tiny ones, and
CPU times.
Writes results/decode_cuda or decode_cpu .json and .md.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.models.architecture import Architecture
from megatron_ext.models.cost import BYTES, Workload, cache_bytes, decode_bytes_per_token
from megatron_ext.models.pattern import ATTENTION, MAMBA, MLP
from megatron_ext.models.presets import PRESETS
from megatron_ext.ops import mamba_ssm_api

PREFIX = {"cuda": ("", "-8b"), "cpu": ("tiny-", "")}
CONV_TAPS = 4


def models(device: str) -> dict[str, Architecture]:
    """Four of equal size."""
    before, after = PREFIX[device]
    hybrid = PRESETS[f"{before}mamba2-hybrid{after}" if device == "cuda" else "tiny-hybrid"].architecture
    transformer = PRESETS[f"{before}transformer{after}"].architecture
    heads = transformer.num_attention_heads
    return {
        "Transformer, full heads": replace(transformer, num_query_groups=heads),
        "Transformer, grouped": replace(transformer, num_query_groups=hybrid.num_query_groups),
        "hybrid": hybrid,
        "Mamba-2": PRESETS[f"{before}mamba2{after}"].architecture,
    }


class Step:
    """One token of a model for a batch of sequences, on caches that are as long as the context."""

    def __init__(self, arch: Architecture, batch: int, device: str) -> None:
        self.arch, self.batch, self.device = arch, batch, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.layers = [self._weights(unit) for unit in arch.pattern]
        self.output = self._random(arch.vocab_size, arch.hidden_size)
        self.token = self._random(batch, arch.hidden_size)

    def _random(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=0.02)

    def _weights(self, unit: str) -> dict[str, Tensor]:
        a, hidden = self.arch, self.arch.hidden_size
        if unit == ATTENTION:
            rows = (a.num_attention_heads + 2 * a.num_query_groups) * a.kv_channels
            return {
                "qkv": self._random(rows, hidden),
                "out": self._random(hidden, a.num_attention_heads * a.kv_channels),
            }
        if unit == MLP:
            rows = a.ffn_hidden_size * (2 if a.gated_linear_unit else 1)
            return {"up": self._random(rows, hidden), "down": self._random(hidden, a.ffn_hidden_size)}
        assert unit == MAMBA, unit
        inner, heads = a.mamba_inner_size, a.mamba_num_heads
        conv, full = inner + 2 * a.mamba_num_groups * a.mamba_state_dim, (heads, a.mamba_head_dim)
        rate = -torch.ones(heads, 1, 1, device=self.device)
        ones = torch.ones(heads, 1, device=self.device).expand(full)
        return {
            "in": self._random(inner + conv + heads, hidden), "conv": self._random(conv, CONV_TAPS),
            "conv_bias": self._random(conv), "A": rate.expand(*full, a.mamba_state_dim), "D": ones, "bias": ones,
            "norm": torch.ones(inner, dtype=self.dtype, device=self.device), "out": self._random(hidden, inner),
        }  # fmt: skip

    def start(self, context: int) -> None:
        """Caches of this length; the last token is the one that is made."""
        a, options = self.arch, {"dtype": self.dtype, "device": self.device}
        conv = a.mamba_inner_size + 2 * a.mamba_num_groups * a.mamba_state_dim
        self.caches: list[tuple[Tensor, ...]] = []
        for unit in a.pattern:
            if unit == ATTENTION:
                size = (self.batch, a.num_query_groups, context, a.kv_channels)
                self.caches.append((torch.zeros(size, **options), torch.zeros(size, **options)))
            elif unit == MAMBA:
                state = (self.batch, a.mamba_num_heads, a.mamba_head_dim, a.mamba_state_dim)
                self.caches.append((torch.zeros(self.batch, conv, CONV_TAPS, **options), torch.zeros(state, **options)))
            else:
                self.caches.append(())

    def cache_bytes(self) -> int:
        """What the caches take."""
        return sum(t.numel() * t.element_size() for cache in self.caches for t in cache)

    def __call__(self) -> Tensor:
        """The logits of one token for each sequence."""
        x = self.token
        for unit, weights, cache in zip(self.arch.pattern, self.layers, self.caches, strict=True):
            work: Callable[..., Tensor] = {ATTENTION: self._attention, MLP: self._mlp, MAMBA: self._mamba}[unit]
            x = x + work(F.rms_norm(x, x.shape[-1:]), weights, *cache)
        return F.rms_norm(x, x.shape[-1:]) @ self.output.T

    def _attention(self, x: Tensor, w: dict[str, Tensor], keys: Tensor, values: Tensor) -> Tensor:
        heads, groups = self.arch.num_attention_heads, self.arch.num_query_groups
        qkv = (x @ w["qkv"].T).view(self.batch, heads + 2 * groups, 1, -1)
        query, key, value = qkv.split([heads, groups, groups], 1)
        keys[:, :, -1:], values[:, :, -1:] = key, value
        # The heads of a group as tokens that ask the same keys, which are then read once and not repeated.
        out = F.scaled_dot_product_attention(query.view(self.batch, groups, heads // groups, -1), keys, values)
        return out.reshape(self.batch, -1) @ w["out"].T

    def _mlp(self, x: Tensor, w: dict[str, Tensor]) -> Tensor:
        up = x @ w["up"].T
        if self.arch.gated_linear_unit:
            gate, up = up.chunk(2, -1)
            return (F.silu(gate) * up) @ w["down"].T
        return F.relu(up).square() @ w["down"].T

    def _mamba(self, x: Tensor, w: dict[str, Tensor], window: Tensor, state: Tensor) -> Tensor:
        a = self.arch
        inner, heads, groups, n = a.mamba_inner_size, a.mamba_num_heads, a.mamba_num_groups, a.mamba_state_dim
        each = (heads, a.mamba_head_dim)
        z, conv, dt = (x @ w["in"].T).split([inner, inner + 2 * groups * n, heads], -1)
        conv = mamba_ssm_api.causal_conv1d_update(conv, window, w["conv"], w["conv_bias"], "silu")
        xs, B, C = conv.split([inner, groups * n, groups * n], -1)
        y = mamba_ssm_api.selective_state_update(
            state, xs.unflatten(-1, each), dt.unsqueeze(-1).expand(-1, *each), w["A"], B.unflatten(-1, (groups, n)),
            C.unflatten(-1, (groups, n)), w["D"], z.unflatten(-1, each), w["bias"], True,
        ).flatten(1)  # fmt: skip
        return F.rms_norm(y, y.shape[-1:], w["norm"]) @ w["out"].T


def timer(step: Step) -> Callable[[], float]:
    """What takes one step and says how many seconds it took; on a GPU a replayed graph."""
    if step.device == "cpu":

        def once() -> float:
            start = time.process_time()
            step()
            return time.process_time() - start

        once()
        return once
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / 10

    replay()
    return replay


def bandwidth(device: str) -> float:
    """Bytes read and written in a second by a copy that no cache holds."""
    source = torch.zeros(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    clock = time.perf_counter if device == "cuda" else time.process_time
    for _ in range(6):
        start = clock()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 2 * source.numel() / statistics.median(times[1:])


def room(device: str) -> int:
    """Bytes that a model and its caches may take."""
    if device == "cuda":
        return int(0.92 * torch.cuda.mem_get_info()[0])
    return int(0.3 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


@torch.no_grad()
def measure(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Every model at every context."""
    width = 1 if device == "cuda" else 2  # of BYTES, which are those of 16 bits
    speed, found = bandwidth(device), {name: {} for name in models(device)}
    missing: dict[str, str] = {}
    for _ in range(args.rounds):
        for name, arch in models(device).items():
            step = None
            for context in args.contexts:
                need = width * (BYTES * arch.num_parameters() + cache_bytes(arch, Workload(args.batch, context)))
                if step is None and need <= room(device):
                    step = Step(arch, args.batch, device)
                if step is None or need - width * BYTES * arch.num_parameters() > room(device):
                    missing[f"{name}, {context:,} tokens"] = f"needs {need / 1e9:.1f} GB"
                    continue
                step.start(context)
                again = timer(step)
                seconds = statistics.median(again() for _ in range(args.repeats))
                entry = found[name].setdefault(str(context), {"seconds": [], "cache_bytes": step.cache_bytes()})
                entry["seconds"].append(seconds)
                moved = width * args.batch * decode_bytes_per_token(arch, Workload(args.batch, context))
                entry["roofline_seconds"] = moved / speed
                del again
                step.caches = []
                gc.collect()
            del step
            gc.collect()
    for entries in found.values():
        for entry in entries.values():
            entry["tokens_per_second"] = args.batch / statistics.median(entry["seconds"])
            entry["roofline_tokens_per_second"] = args.batch / entry.pop("roofline_seconds")
    return {"bandwidth": speed, "models": found, "missing": missing}


def table(report: dict[str, Any]) -> str:
    """Ratios of the hybrid first, measured beside what the bytes allow."""
    found, contexts = report["models"], report["contexts"]

    def ratio(context: str, base: str) -> str:
        ours, theirs = found["hybrid"].get(context), found[base].get(context)
        if not ours or not theirs:
            return "not measured"
        keys = ("tokens_per_second", "roofline_tokens_per_second")
        measured, bytes_allow = (ours[key] / theirs[key] for key in keys)
        return f"{measured:.2f} ({bytes_allow:.2f})"

    names = list(found)
    head = ["context", "hybrid over full heads", "hybrid over grouped", *(f"{name}, tokens/s" for name in names)]
    lines = [
        f"One token of a batch of {report['batch']}, {report['dtype']}, {report['device']}; in brackets what the bytes "
        f"allow at {report['bandwidth'] / 1e9:,.0f} GB/s.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for context in map(str, contexts):
        cells = []
        for name in names:
            entry = found[name].get(context)
            cells.append(
                "not measured" if entry is None else
                f"{entry['tokens_per_second']:,.1f} ({entry['roofline_tokens_per_second']:,.0f}), "
                f"cache {entry['cache_bytes'] / 1e6:,.1f} MB"
            )  # fmt: skip
        row = [f"{int(context):,}", *(ratio(context, base) for base in names[:2]), *cells]
        lines.append("| " + " | ".join(row) + " |")
    lines += [f"\n{what}: not measured, {why}" for what, why in report["missing"].items()]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536, 131072])
    parser.add_argument("--rounds", type=int, default=3, help="times that each model is built and measured")
    parser.add_argument("--repeats", type=int, default=7, help="steps of a round, of which the median counts")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    report = {
        "what": "one token at a growing context", **machine.describe(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "dtype": "bfloat16" if device == "cuda" else "float32", "batch": args.batch, "contexts": args.contexts,
        "parameters": {name: arch.num_parameters() for name, arch in models(device).items()},
        **measure(args, device),
    }  # fmt: skip
    machine.write(report, f"decode_{device}", table(report), args.out)


if __name__ == "__main__":
    main()
