"""Compile the Triton kernels for an H100 or H200 on a machine without one, and print what each takes, as JSON.

    python tests/support/hopper_compile.py [--all] [--limits]

Triton compiles without a device if it is told what for. The kernels are reached through the public functions, with
tensors on the CPU; they are compiled, not run. `--all` compiles every configuration, not only each kernel's first.
`--limits` takes the scan alone, with the largest heads and states that there are tiles for, and tells no registers.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import torch
import triton
from no_device import NoDevice
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import autotuner, driver, jit

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
# Two lists of registers: not only the sums, also the first operand.
WGMMA_FROM_REGISTERS = re.compile(r"wgmma\.mma_async[^;{]*\{[^}]*\}\s*,\s*\{")
found: list[dict[str, Any]] = []


def copied_transposes(ttgir: str) -> int:
    """Tiles that are transposed in registers and then written to shared memory, instead of read there the other way."""
    count, transposed = 0, set()
    for line in ttgir.splitlines():
        if defined := re.match(r"\s*(%\w+)(?::\d+)? = (\S+)", line):  # names are used again in other regions
            (transposed.add if defined[2] == "tt.trans" else transposed.discard)(defined[1])
        if written := re.search(r"ttg\.local_(?:alloc|store) (%\w+)", line):
            count += written[1] in transposed
    return count


def _describe(name: str, kernel: Any) -> dict[str, Any]:
    carried = [held.count("=") for held in re.findall(r"iter_args\(([^)]*)\)", kernel.asm["ttir"])]
    return {
        "kernel": name,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "shared_bytes": kernel.metadata.shared,
        "carried": max(carried, default=0),
        "copied_transposes": copied_transposes(kernel.asm["ttgir"]),
    }


def _describe_code(ptx: str) -> dict[str, int]:
    arch = re.search(r"\.target (sm_\w+)", ptx)[1]  # type: ignore[index]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(PTXAS), "-v", f"-arch={arch}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),  # type: ignore[index]
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", said)[1]),  # type: ignore[index]
        "matrix_instructions": ptx.count("wgmma.mma_async") + ptx.count("mma.sync"),
        "operands_in_registers": len(WGMMA_FROM_REGISTERS.findall(ptx)),
    }


def _named(self: Any, source: Any, metadata: dict[str, Any], *_: Any) -> str:
    """In place of PTX: what its translation notes."""
    metadata["name"] = "kernel"
    return ""


def install(every_configuration: bool, machine_code: bool) -> None:
    """From here on launches compile, as far as shared memory is known, or to machine code too."""
    driver.set_active(NoDevice())  # type: ignore[arg-type]
    CUDABackend.make_cubin = lambda *_: b""  # never run
    if not machine_code:
        CUDABackend.make_ptx = _named  # shared memory is known before
    launch = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        code = _describe_code(kernel.asm["ptx"]) if machine_code else {}
        found.append(_describe(self.fn.__name__, kernel) | code)
        return kernel

    def each(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.configs if every_configuration else self.configs[:1]:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    jit.JITFunction.run = compile_only
    autotuner.Autotuner.run = each


def largest_scans() -> None:
    """Whole heads in a program, which is what many heads and rows come to; 16 bits and 32."""
    from megatron_ext.ops.ssd.triton import ssd
    from megatron_ext.ops.ssd.triton_tiling import MANY_PROGRAMS
    from megatron_ext.ops.triton_tiles import MAX_HEAD_CHANNELS, MAX_HEAD_STATE, MAX_STATE

    heads = 4
    batch, length = MANY_PROGRAMS // heads, 128
    for dtype in (torch.bfloat16, torch.float32):
        for channels in (MAX_HEAD_CHANNELS, MAX_HEAD_STATE // MAX_STATE):
            state = MAX_HEAD_STATE // channels
            x = torch.zeros(batch, length, heads, channels, dtype=dtype)
            B = torch.zeros(batch, length, 2, state, dtype=dtype)
            leaves = [x, torch.zeros(batch, length, heads), torch.zeros(heads), B, B.clone(), torch.zeros(heads)]
            for t in leaves:
                t.requires_grad_()
            before, begun = len(found), torch.zeros(batch, length, dtype=torch.int32)
            y, final = ssd(*leaves, initial_states=torch.zeros(batch, heads, channels, state), seq_idx=begun)
            torch.autograd.grad((y.sum(), final.sum()), leaves)
            for each in found[before:]:
                each.update(dtype=str(dtype), channels=channels, state=state)


def layer() -> None:
    """The benchmark's layer, and one of a selective scan, with all that a kernel can be asked for."""
    from megatron_ext.ops.causal_conv1d.triton import conv_step
    from megatron_ext.ops.gated_norm import triton as norm
    from megatron_ext.ops.mamba_mixer.projection import Projection
    from megatron_ext.ops.mamba_mixer.triton import conv_scan_norm
    from megatron_ext.ops.selective_scan.triton import selective_scan
    from megatron_ext.ops.ssd.triton_decode import state_step

    heads, channels, groups, state, length = 128, 64, 8, 128, 2048
    inner = heads * channels
    conv = inner + 2 * groups * state
    bf16: dict[str, Any] = {"dtype": torch.bfloat16}
    leaves: list[Any] = [
        torch.zeros(1, length, inner + conv + heads, **bf16), torch.zeros(conv, 4, **bf16), torch.zeros(conv, **bf16),
        torch.zeros(heads), torch.zeros(heads), torch.zeros(heads),
    ]  # fmt: skip
    initial = torch.zeros(1, heads, channels, state)
    weight, gate = torch.ones(inner, **bf16), torch.zeros(1, length, inner, **bf16)
    for t in (*leaves, initial, weight, gate):
        t.requires_grad_()
    projection, documents = Projection(heads, channels, groups), torch.zeros(1, length, dtype=torch.int32)
    for norm_weight in (None, weight):
        y, final = conv_scan_norm(
            *leaves, projection=projection, initial_states=initial, seq_idx=documents, norm_weight=norm_weight
        )
        own = [*leaves, initial] if norm_weight is None else [*leaves, initial, weight]
        torch.autograd.grad((y.sum(), final.sum()), own)
    out = norm.gated_rms_norm(y.detach(), weight, gate, group_size=inner // groups)
    torch.autograd.grad(out.sum(), [weight, gate])

    # MambaVision-T's third stage
    sequence = [torch.zeros(2, 196, 160, **bf16) for _ in range(3)]
    projections = [torch.zeros(2, 196, 8, **bf16) for _ in range(2)]
    x, dt, z = sequence
    own = [x, dt, torch.zeros(160, 8), *projections, torch.zeros(160), z, torch.zeros(160), torch.zeros(2, 160, 8)]
    for t in own:
        t.requires_grad_()
    y, final = selective_scan(*own, dt_softplus=True)
    torch.autograd.grad((y.sum(), final.sum()), own)

    with torch.no_grad():
        token, slots = torch.zeros(2, conv, **bf16), torch.zeros(2, dtype=torch.int64)
        conv_step(token, torch.zeros(2, conv, 4, **bf16), leaves[1], leaves[2], "silu", slots)
        x, B = torch.zeros(2, heads, channels, **bf16), torch.zeros(2, groups, state, **bf16)
        each = (heads, channels)
        dt, A = torch.zeros(2, heads, 1, **bf16).expand(2, *each), torch.zeros(heads, 1, 1).expand(*each, state)
        D = torch.zeros(heads, 1).expand(each)
        state_step(torch.zeros(2, *each, state), x, dt, A, B, B, D, x, D, True, slots)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:  # one of their own, for kernels that cannot run
        os.environ["TRITON_CACHE_DIR"] = cache
        install("--all" in sys.argv, machine_code="--limits" not in sys.argv)
        largest_scans() if "--limits" in sys.argv else layer()
    print(json.dumps(found, indent=1))
