"""Compile the kernels of ssm_gpu.py for an H100 or H200 on a machine without one, into Triton's cache.

    TRITON_CACHE_DIR=DIR python benchmarks/precompile.py [--only ours] [--sizes full batch tp8 context pretrain tests]

All configurations that would be timed, of ours and, where they are on the PYTHONPATH (`peers.py`), of mamba-ssm's:
several minutes of one core that a rented GPU then does not wait for. Nothing is run. The cache is good for the same
build of Triton, the same ptxas and the same sources, whose keys are printed; what it does not hold is compiled as ever.
On the machine with the GPU it does the same on all cores at once, where a launch compiles one configuration at a time.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import triton
from no_device import HOPPER, NoDevice
from ssm_gpu import HEAD_DIM, NAMES, SIZES, Size, call, inputs
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import autotuner, driver, jit
from triton.runtime.cache import triton_key

# Those that are timed, the layer of the hybrid model that pretrain.py trains, and that of tests/functional/test_gpu.py.
ALL = SIZES | {"pretrain": Size(4, 4096, 64, 8), "tests": Size(2, 256, 8, 2)}
compiled: list[str] = []
children: list[int] = []


def key() -> str:
    """What a cache depends on beside the sources: the build of Triton, and ptxas."""
    build = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    return f"Triton {triton.__version__}, build {build}, {get_ptxas(HOPPER.arch).version}"


def in_a_fork(work: Callable[[], object], jobs: int) -> None:
    """Do something whose outcome is in the cache, beside so many others; this process itself never compiles."""
    if len(children) >= jobs:
        children.remove(os.wait()[0])
    child = os.fork()
    if child:
        children.append(child)
        return
    status = 1
    try:
        work()
        status = 0
    except Exception as error:  # whatever the compiler raises: it would not be chosen either
        print(f"\n{type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    finally:
        os._exit(status)


def install(jobs: int) -> None:
    """From here on launches compile, every configuration that the kernel's own pruning leaves."""
    driver.set_active(NoDevice())  # type: ignore[arg-type]
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=132)  # type: ignore
    launch = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        compiled.append(self.fn.__name__)
        print(f"\r{len(compiled)} begun: {compiled[-1]:40}", end="", file=sys.stderr)
        in_a_fork(lambda: launch(self, *args, grid=grid, warmup=True, **kwargs), jobs)

    def each(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.best_config = config  # which callers read
            self.fn.run(*args, **kwargs, **config.all_kwargs())

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
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    args = parser.parse_args()
    print(key(), file=sys.stderr)
    install(args.jobs)
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
    while children:
        children.remove(os.wait()[0])
    print(f"\n{len(compiled)} launches of {len(set(compiled))} kernels compiled", file=sys.stderr)


if __name__ == "__main__":
    main()
