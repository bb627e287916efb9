"""The Triton kernels: by Triton's interpreter on a CPU, compiled for a GPU that is not there, and on a GPU that is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.lm_head import losses
from megatron_ext.lm_head.divergences import TopK
from megatron_ext.lm_head.losses import LMHead
from megatron_ext.lm_head.objective import Objective

PROGRAM = Path(__file__).parents[2] / "support" / "distillation_kernels.py"


def wrong_cases(device: str, environment: dict[str, str]) -> dict[str, str]:
    command = [sys.executable, str(PROGRAM), device]
    path = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | path | environment)
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert len(report) > 12
    return {name: error for name, error in report.items() if error}


def test_the_kernels_agree_with_float64_under_the_interpreter() -> None:
    assert wrong_cases("cpu", {"TRITON_INTERPRET": "1"}) == {}


@pytest.mark.gpu
def test_the_kernels_agree_with_float64_on_a_gpu() -> None:
    assert wrong_cases("cuda", {}) == {}


@pytest.mark.parametrize(("reverse", "tokens"), [(False, 128_000), (True, 128_256), (False, 0)])
def test_the_kernels_compile_for_a_gpu(
    reverse: bool, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For Hopper, at a real vocabulary, also on a rank that has nothing but padding; compiling needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_ext.lm_head import triton_kl

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"COLUMNS": 128_256, "TOKENS": tokens, "REVERSE": reverse, "SCALED": True, "BLOCK": triton_kl.BLOCK}
    types = dict.fromkeys(("student", "teacher"), "*bf16") | {"labels": "*i64"}
    types |= dict.fromkeys(("count", "student_stride", "teacher_stride"), "i32")
    types |= dict.fromkeys(("inverse_temperature", "kd_scale", "ce_scale"), "fp32")
    types |= dict.fromkeys(("out", "mask", "statistics", "divergence"), "*fp32") | dict.fromkeys(constants, "constexpr")
    for kernel in (triton_kl._statistics, triton_kl._gradient):
        fixed = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
        source: Any = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, fixed)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": triton_kl.WARPS})
        assert len(compiled.asm["cubin"]) > 1000


def test_they_are_chosen_on_cuda_where_they_can() -> None:
    from megatron_ext.lm_head import triton_kl

    head = LMHead(torch.empty(1, 1, 1), torch.empty(1, 1))
    stored = TopK(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1), torch.zeros(1))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for name, expected in (("forward-kl", triton_kl.loss_in_triton), ("reverse-kl", triton_kl.loss_in_triton)):
        assert losses.choose_kernel(cuda, head, Objective(name)) is expected
        assert losses.choose_kernel(cpu, head, Objective(name)) is losses.loss_in_torch
    assert losses.choose_kernel(cuda, head, Objective("jsd")) is losses.loss_in_torch
    assert losses.choose_kernel(cuda, stored, Objective("top-k")) is losses.loss_in_torch
