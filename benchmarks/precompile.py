"""Compile the kernels of ssm_gpu.py for an H100 or H200 on a machine without one, into Triton's cache.

    TRITON_CACHE_DIR=DIR python benchmarks/precompile.py [--only ours] [--sizes full batch tp8 context pretrain tests]

All configurations that would be timed, of ours and, where they are on the PYTHONPATH (`peers.py`), of mamba-ssm's:
several minutes of one core that a rented GPU then does not wait for. Nothing is run. The cache is good for the same
version of Triton and of the sources; what it does not hold is compiled as ever.
"""

import argparse
import contextlib
import importlib.util
import sys
import types
from typing import Any

import torch
from ssm_gpu import HEAD_DIM, NAMES, SIZES, Size, call, inputs
from triton.backends.compiler import GPUTarget
from triton.runtime import autotuner, driver, jit

HOPPER = GPUTarget("cuda", 90, 32)
# Those that are timed, the layer of the hybrid model that pretrain.py trains, and that of tests/functional/test_gpu.py.
ALL = SIZES | {"pretrain": Size(4, 4096, 64, 8), "tests": Size(2, 256, 8, 2)}
compiled: list[str] = []


class _NoDevice:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return HOPPER


def install() -> None:
    """From here on launches compile, every configuration that the kernel's own pruning leaves."""
    driver.set_active(_NoDevice())  # type: ignore[arg-type]
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=132)  # type: ignore
    launch = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        compiled.append(self.fn.__name__)
        print(f"\r{len(compiled)} compiled: {compiled[-1]:40}", end="", file=sys.stderr)
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    def each(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.best_config = config  # which callers read
            try:
                self.fn.run(*args, **kwargs, **config.all_kwargs())
            except Exception as error:  # whatever the compiler raises: it would not be chosen either
                print(f"\n{self.base_fn.__name__} {config}: {type(error).__name__}", file=sys.stderr)

    jit.JITFunction.run = compile_only
    autotuner.Autotuner.run = each


def convolution_without_a_gpu() -> None:
    """Stand in for causal-conv1d's compiled functions, which are no Triton kernels."""
    module: Any = types.ModuleType("causal_conv1d_cuda")
    sys.modules["causal_conv1d_cuda"] = module
    from causal_conv1d import cpp_functions  # pyright: ignore[reportMissingImports]

    def forward(x: Any, *_: Any) -> Any:
        return torch.empty_like(x)

    def backward(x: Any, weight: Any, bias: Any, dout: Any, *more: Any) -> Any:
        dx = next((t for t in more if isinstance(t, torch.Tensor) and t.shape == x.shape), torch.empty_like(x))
        return dx, torch.empty_like(weight), torch.empty_like(bias), None

    cpp_functions.causal_conv1d_fwd_function = forward
    cpp_functions.causal_conv1d_bwd_function = backward


def ours(size: Size, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """Our kernels, whatever the dispatch says of a machine without a GPU."""
    from megatron_ext.ops.mamba_mixer.triton import conv_scan_norm

    norm: dict[str, Any] = {"norm_weight": t.get("norm_weight"), "norm_before_gate": False}
    return conv_scan_norm(*(t[name] for name in NAMES), projection=size.projection, **norm)[0]


def theirs(size: Size, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """mamba-ssm's kernels."""
    from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
        mamba_split_conv1d_scan_combined,
    )

    return call(mamba_split_conv1d_scan_combined, size, t)


def main() -> None:
    """Compile what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("ours", "theirs"))
    parser.add_argument("--sizes", nargs="+", choices=list(ALL), default=list(ALL))
    args = parser.parse_args()
    install()
    cases = {"ours": ours, "theirs": theirs}
    if importlib.util.find_spec("mamba_ssm") is None:
        del cases["theirs"]
    elif args.only != "ours":
        convolution_without_a_gpu()
    for name, case in cases.items():
        if args.only not in (None, name):
            continue
        for label in args.sizes:
            size = ALL[label]
            for norm in (False, True):
                given = inputs(size, norm, "cpu")
                y = case(size, {key: t.requires_grad_() for key, t in given.items()})
                y.backward(torch.zeros(size.batch, size.tokens, size.heads * HEAD_DIM, dtype=torch.bfloat16))
    print(f"\n{len(compiled)} launches of {len(set(compiled))} kernels compiled", file=sys.stderr)


if __name__ == "__main__":
    main()
