"""Every configuration of every tuned kernel of the scan, each by itself, against the recurrence in float64.

Elsewhere the fastest one is what is tested, and which that is depends on the GPU and its mood: compilers have been
wrong about single ones (ptxas 12.8 on Hopper, by public reports). Compiling takes the time: `pytest -n 8` spreads it.
"""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ssm_oracle import assert_agree, inputs
from torch import Tensor

from megatron_ext.ops.ssd import cpu, triton_tiling
from megatron_ext.ops.ssd import triton as scan
from megatron_ext.ops.ssd import triton_backward_kernels as backward_kernels
from megatron_ext.ops.ssd import triton_forward_kernels as forward_kernels
from megatron_ext.ops.ssd import triton_state_kernels as state_kernels

pytestmark = [pytest.mark.triton, pytest.mark.gpu]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS: dict[str, Any] = {
    "states": state_kernels.states_kernel,
    "scan": forward_kernels.scan_kernel,
    "states_backward": state_kernels.states_backward_kernel,
    "scan_backward": backward_kernels.scan_backward_kernel,
}
# By kernel, number, and chunks of a run in two passes over the states (None: one pass), which the scans do not know of.
CONFIGURATIONS = [
    (name, i, run)
    for name, kernel in KERNELS.items()
    for i in range(len(kernel.configs))
    for run in ((None, 2) if name.startswith("states") else (None,))
]
# Relative to the largest entry of each result.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
BATCH, LENGTH, HEADS, CHANNELS, GROUPS, STATE = 2, 333, 8, 64, 2, 128


@cache
def given(dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs in float64 that `dtype` can hold, with a gate, and what comes back from the loss."""
    sizes = {"batch": BATCH, "heads": HEADS, "channels": CHANNELS, "groups": GROUPS, "state": STATE}
    found = inputs(LENGTH, skip_per_channel=True, **sizes)
    generator = torch.Generator().manual_seed(2)
    for name, like in (("z", "x"), ("dout", "x"), ("dfinal", "initial_states")):
        found[name] = torch.randn(found[like].shape, generator=generator, dtype=torch.float64)
    rounded = {"x", "B", "C", "z", "dout"}
    return {name: (t.to(dtype).double() if name in rounded else t).to(DEVICE) for name, t in found.items()}


def documents() -> Tensor:
    """Their ends fall inside of chunks, on borders of chunks, and after one token."""
    ends = torch.tensor([1, 60, 128, 129, 300], device=DEVICE)
    return torch.bucketize(torch.arange(LENGTH, device=DEVICE), ends, right=True).int().expand(BATCH, -1).contiguous()


@cache
def expected(dtype: torch.dtype, gated: bool) -> dict[str, Tensor]:
    """By plain torch's scan in float64, which its own tests hold against the recurrence."""
    leaves = {name: t.clone().requires_grad_() for name, t in given(dtype).items() if name not in ("dout", "dfinal")}
    arguments = {name: t for name, t in leaves.items() if name != "z"}
    y, final = cpu.ssd(**arguments, seq_idx=documents() if gated else None)
    found = {"out": y * F.silu(leaves["z"]) if gated else y, "final": final}
    own = leaves if gated else arguments
    loss = (found["out"] * given(dtype)["dout"]).sum() + (final * given(dtype)["dfinal"]).sum()
    gradients = torch.autograd.grad(loss, list(own.values()))
    return {name: t.detach() for name, t in found.items()} | {
        f"d{name}": g for name, g in zip(own, gradients, strict=True)
    }


def by_the_kernels(dtype: torch.dtype, gated: bool) -> dict[str, Tensor]:
    """The same; what is not rounded is float32."""
    narrow = {"x", "B", "C", "z", "dout"}
    own = {name: t.to(dtype if name in narrow else torch.float32) for name, t in given(dtype).items()}
    x, dt, A, B, C, D, z = (own[name] for name in ("x", "dt", "A", "B", "C", "D", "z"))
    t, steps, gate = triton_tiling.scan_tiling(x, B, None), scan.StepSizes(), z if gated else None
    y, out, final, saved = scan.forward(
        t, x, dt, A, B, C, D, gate, steps, own["initial_states"], documents() if gated else None, True
    )
    into = scan.Gradients(*(torch.empty_like(each) for each in (x, dt, B, C)), torch.empty_like(z) if gated else None)
    dA, dD, _, dinitial = scan.backward(
        t, saved, x, dt, A, B, C, D, gate, y, steps, own["dout"], own["dfinal"], into, True
    )
    found = {"out": out if gated else y, "final": final, "dx": into.x, "ddt": into.raw, "dA": dA, "dB": into.B}
    found |= {"dC": into.C, "dD": dD, "dinitial_states": dinitial} | ({"dz": into.z} if gated else {})
    return {name: each for name, each in found.items() if each is not None}


@pytest.mark.parametrize("gated", [False, True], ids=["bare", "gated documents"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("name", "index", "run"), CONFIGURATIONS, ids=str)
def test_configuration(
    name: str, index: int, run: int | None, dtype: torch.dtype, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel pinned to one configuration, the others to their first: results and all gradients.

    Bare with few programs, in which a head is halved; with all else in as few programs as there can be.
    """
    from triton.runtime.errors import OutOfResources

    for each, kernel in KERNELS.items():
        monkeypatch.setattr(kernel, "configs", [kernel.configs[index if each == name else 0]])
    for many in ("MANY_PROGRAMS", "WALKERS") if gated else ():
        monkeypatch.setattr(triton_tiling, many, 1)
    monkeypatch.setattr(triton_tiling.ScanTiling, "run", lambda self: run or self.chunks)
    pinned = KERNELS[name].configs[0]
    try:
        got = by_the_kernels(dtype, gated)
    except OutOfResources as error:
        if index == 0:
            raise AssertionError(f"{name}, {pinned}: the first configuration must fit") from error
        pytest.skip(f"{name}, {pinned}: {error}")
    for result, right in expected(dtype, gated).items():
        try:
            assert_agree({result: got[result]}, {result: right}, TOLERANCE[dtype])
        except AssertionError as error:
            raise AssertionError(f"{name}, {pinned}, {dtype}: {error}") from None
