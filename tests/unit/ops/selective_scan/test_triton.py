"""The Triton scan against the recurrence in float64: under the interpreter on a CPU, compiled where there is a GPU."""

from functools import partial
from typing import Any

import pytest
import torch
from selective_oracle import inputs, results
from ssm_oracle import assert_agree
from torch import Tensor

from megatron_ext.ops.selective_scan import cpu, naive, triton

pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
scan = partial(triton.selective_scan, chunk_size=4)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two channels of four states, so that a handful of channels has several programs."""
    monkeypatch.setattr(triton, "STATES", 8)


def check(given: dict[str, Tensor], dtype: torch.dtype = torch.float32, tolerance: float | None = None) -> None:
    expected = results(naive.selective_scan, given, torch.float64)
    got = results(scan, given, torch.float32, narrow=dtype, device=DEVICE)
    assert got["y"].dtype == got["dx"].dtype == got["ddt"].dtype == got["dB"].dtype == dtype
    assert_agree(got, expected, tolerance or TOLERANCE[dtype])


@pytest.mark.parametrize("length", [1, 4, 9])
def test_agrees_with_the_recurrence(length: int) -> None:
    """Around borders of chunks, with channels and states that do not fill their tiles."""
    check(inputs(length, batch=1, channels=3))


def test_rows() -> None:
    check(inputs(6, batch=2, channels=2, state=2))


@pytest.mark.parametrize("absent", [("D", "dt_bias"), ("z", "initial_states")], ids=str)
def test_what_may_be_absent(absent: tuple[str, ...]) -> None:
    check(inputs(6, batch=1, channels=2, absent=absent))


def test_parts_of_one_projection() -> None:
    """x and z side by side, and dt, B and C, are read where they lie."""
    given = inputs(6, batch=2, channels=2)
    expected = results(naive.selective_scan, given, torch.float64)
    xz = torch.cat([given.pop("x"), given.pop("z")], -1)
    projected = torch.cat([given.pop("dt"), given.pop("B"), given.pop("C")], -1)

    def split(xz: Tensor, projected: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        (x, z), (dt, B, C) = xz.split(2, -1), projected.split([2, 3, 3], -1)
        return scan(x, dt, B=B, C=C, z=z, **more)

    got = results(split, given | {"xz": xz, "projected": projected}, torch.float32, device=DEVICE)
    got["dx"], got["dz"] = got.pop("dxz").split(2, -1)
    got["ddt"], got["dB"], got["dC"] = got.pop("dprojected").split([2, 3, 3], -1)
    assert_agree(got, expected, 2e-5)


@pytest.mark.parametrize("decay", [1e-4, 1e4])
def test_weak_and_strong_decay(decay: float) -> None:
    check(inputs(9, batch=1, channels=2, decay=decay))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype: torch.dtype) -> None:
    given = {name: t.to(dtype).double() for name, t in inputs(6, batch=1, channels=2).items()}
    check(given, dtype)


def test_either_output_alone() -> None:
    given = inputs(5, batch=1, channels=2, state=2)
    for pick in (0, 1):
        gradients = []
        for form, dtype, device in ((naive.selective_scan, torch.float64, "cpu"), (scan, torch.float32, DEVICE)):
            leaves = [t.to(device, dtype).requires_grad_() for t in given.values()]
            out = form(**dict(zip(given, leaves, strict=True)), dt_softplus=True)[pick]
            found = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)
            gradients.append({str(i): t.cpu() for i, t in enumerate(found)})
        assert_agree(gradients[1], gradients[0], 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("sizes", [(196, 8, 160, 8), (49, 16, 320, 8), (1000, 2, 100, 16), (77, 1, 5, 64)], ids=str)
def test_agrees_on_a_gpu(sizes: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At MambaVision's sizes and others, by every configuration, against plain torch in float64."""
    from megatron_ext.ops.selective_scan import triton_kernels

    monkeypatch.undo()
    length, batch, channels, state = sizes
    given = inputs(length, batch=batch, channels=channels, state=state)
    given = {name: t.to(dtype).double() for name, t in given.items()}
    expected = results(cpu.selective_scan, given, torch.float64, device=DEVICE)
    kernels: tuple[Any, ...] = (triton_kernels.forward_kernel, triton_kernels.backward_kernel)
    for index in range(max(len(kernel.configs) for kernel in kernels)):
        with pytest.MonkeyPatch.context() as patch:
            for kernel in kernels:
                patch.setattr(kernel, "configs", [kernel.configs[index % len(kernel.configs)]])
            got = results(triton.selective_scan, given, torch.float32, narrow=dtype, device=DEVICE)
        assert_agree(got, expected, TOLERANCE[dtype])
