"""Mamba-2 mixer block on one CPU thread, forward and backward: ours against transformers' torch path.

    OMP_NUM_THREADS=1 python benchmarks/ssm_cpu.py

The block is transformers' Mamba2Mixer (input projection, convolution, scan, gated norm, output projection) with one set
of weights; ours is `mamba_split_conv1d_scan_combined` with the two projections by `platform.linear`, as the product's
layers have them. Each case runs in a process of its own, in turns. Times are CPU times, which equal wall times on an
idle machine; the load is written down.
Writes results/ssm_cpu.json and .md.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from pathlib import Path

import machine
import torch
import transformers
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from megatron_ext.ops import mamba_ssm_api
from megatron_ext.platform.linear import linear

WARM_UP = 6  # the first steps mostly wait for new memory from the system
CASES = ("transformers, chunk 256", "transformers, chunk 64", "megatron_ext")


def block(case: str, hidden: int, head_dim: int, state: int) -> tuple[Mamba2Mixer, torch.nn.Module]:
    """The mixer, and what runs it."""
    torch.manual_seed(0)
    chunk = int(case.split()[-1]) if case.startswith("transformers") else 256
    config = Mamba2Config(
        hidden_size=hidden,
        expand=2,
        num_heads=2 * hidden // head_dim,
        head_dim=head_dim,
        state_size=state,
        n_groups=1,
        chunk_size=chunk,
        num_hidden_layers=1,
    )
    mixer = Mamba2Mixer(config, 0)
    return mixer, mixer if case.startswith("transformers") else Ours(mixer)


class Ours(torch.nn.Module):
    """The same weights through our operations."""

    def __init__(self, mixer: Mamba2Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, l, hidden) to (b, l, hidden)."""
        m = self.mixer
        y = mamba_ssm_api.mamba_split_conv1d_scan_combined(
            linear(x, m.in_proj.weight, m.in_proj.bias),
            m.conv1d.weight.squeeze(1),
            m.conv1d.bias,
            m.dt_bias,
            -m.A_log.exp(),
            m.D,
            m.chunk_size,
            rmsnorm_weight=m.norm.weight,
            rmsnorm_eps=m.norm.variance_epsilon,
            outproj_weight=m.out_proj.weight,
            headdim=m.head_dim,
            ngroups=m.n_groups,
            norm_before_gate=False,
        )
        assert isinstance(y, torch.Tensor)  # no final states were asked for
        return y


def measure(case: str, arguments: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of the median step and of its forward, the growth of the peak RSS, the output's checksum."""
    torch.set_num_threads(1)
    mixer, run = block(case, arguments.hidden, arguments.head_dim, arguments.state)
    x = torch.randn(arguments.batch, arguments.length, arguments.hidden, requires_grad=True)
    dy = torch.randn(x.shape)
    run(x[:, :32]).sum().backward()
    start_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps, forwards, y = [], [], x
    for _ in range(WARM_UP + arguments.steps):
        start = time.process_time()
        y = run(x)
        middle = time.process_time()
        y.backward(dy)
        steps.append(time.process_time() - start)
        forwards.append(middle - start)
        mixer.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_rss
    return {
        "seconds": statistics.median(steps[WARM_UP:]),
        "forward": statistics.median(forwards[WARM_UP:]),
        "peak_mb": peak / 1024,
        "checksum": y.double().square().sum().item(),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"batch": 4, "length": 1024, "hidden": 256, "head_dim": 32, "state": 64, "steps": 7, "rounds": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(arguments.rounds):
        for case in CASES:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                runs[case].append(pool.apply(measure, (case, arguments)))
    tokens = arguments.batch * arguments.length
    cases = {}
    for case, results in runs.items():
        median = {key: statistics.median(result[key] for result in results) for key in results[0]}
        cases[case] = {"tokens_per_second": tokens / median["seconds"], **median}
    ours = cases["megatron_ext"]["tokens_per_second"]
    lines = [
        "Mamba-2 mixer block, forward + backward, one CPU thread, fp32; ours is so many times as fast as the others.",
        "",
        "| block | tokens/s | forward s | step s | peak MB | ours over this |",
        "|---|---|---|---|---|---|",
    ]
    for case, result in cases.items():
        result["ours_over_this"] = ours / result["tokens_per_second"]
        lines.append(
            f"| {case} | {result['tokens_per_second']:,.0f} | {result['forward']:.3f} | {result['seconds']:.3f} "
            f"| {result['peak_mb']:.0f} | {result['ours_over_this']:.2f} |"
        )
    report = {
        "what": "Mamba-2 mixer block, forward + backward, float32, one thread; times are CPU times",
        **machine.describe(),
        "sizes": {name: getattr(arguments, name) for name in sizes},
        "transformers": transformers.__version__,
        "cases": cases,
    }
    machine.write(report, "ssm_cpu", "\n".join(lines), arguments.out)


if __name__ == "__main__":
    main()
