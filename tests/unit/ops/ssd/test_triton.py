"""The Triton scan against the recurrence in float64: under the interpreter on a CPU, compiled where there is a GPU."""

from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ssm_oracle import assert_agree, inputs, results
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.ops.ssd import cpu, naive
from megatron_ext.ops.ssd import triton as scan
from megatron_ext.ops.ssd.triton_tiling import ScanTiling, scan_tiling

pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """One layout of a scan; `ends` are those of documents."""

    name: str
    length: int
    chunk: int | None = 16
    ends: tuple[int, ...] = ()
    sizes: dict[str, Any] = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    def given(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Inputs that `dtype` can hold where it matters."""
        found = {name: t for name, t in inputs(self.length, **self.sizes).items() if name not in self.absent}
        return {name: t.to(dtype).double() if name in ("x", "B", "C") else t for name, t in found.items()}

    def documents(self, device: str) -> dict[str, Any]:
        batch = int(self.sizes.get("batch", 2))
        spans = pairwise((0, *self.ends, self.length))
        row = torch.cat([torch.full((b - a,), i, dtype=torch.int32) for i, (a, b) in enumerate(spans)])
        return {"seq_idx": row.expand(batch, -1).to(device)} if self.ends else {}


# Small enough for the interpreter. `rows` of a chunk of 64 are 32 in float32, so two programs share one.
SMALL = [
    Case("documents", 39, ends=(5, 16, 17, 33), sizes={"batch": 1, "skip_per_channel": True}),
    Case("bare", 19, sizes={"batch": 2, "heads": 3, "groups": 3}, absent=("D", "initial_states")),
    Case("one token", 1, sizes={"batch": 1}),
    Case("two row blocks", 70, chunk=64, ends=(3, 40, 66), sizes={"batch": 1, "heads": 3, "groups": 1}),
    Case("half", 20, ends=(5, 17), sizes={"batch": 1, "heads": 2, "groups": 1}),
]
LARGE = [
    Case(
        "hybrid", 1000, None, (1, 128, 129, 700), {"batch": 2, "heads": 32, "channels": 64, "groups": 8, "state": 128}
    ),
    Case("mamba2", 513, None, (), {"batch": 1, "heads": 10, "channels": 64, "groups": 1, "state": 128}),
    Case("wide", 300, None, (100,), {"batch": 1, "heads": 4, "channels": 64, "groups": 2, "state": 256}),
    Case("odd", 333, None, (), {"batch": 3, "heads": 6, "channels": 48, "groups": 2, "state": 80}),
]
RUNS = [
    Case("documents", 119, ends=(5, 16, 17, 33, 64, 70, 96), sizes={"batch": 1, "heads": 2, "groups": 1}),
    Case("one document", 81, sizes={"batch": 2, "heads": 2, "decay": 1e-3}),
    Case("from nothing", 50, sizes={"batch": 1, "heads": 1, "groups": 1}, absent=("initial_states",)),
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def exact(case: Case, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the recurrence; for large cases by plain torch's scan in float64, which its tests hold against it."""
    if case in SMALL + RUNS:
        return results(naive.ssd, given, torch.float64, **case.documents("cpu"))
    return results(cpu.ssd, given, torch.float64, device=DEVICE, **case.documents(DEVICE))


def check(case: Case, dtype: torch.dtype) -> None:
    given = case.given(dtype)
    expected = exact(case, given)
    more = case.documents(DEVICE) | {"chunk_size": case.chunk}
    got = results(scan.ssd, given, torch.float32, narrow=dtype, device=DEVICE, **more)
    assert got["y"].dtype == got["dx"].dtype == got["dB"].dtype == dtype
    assert got["final"].dtype == torch.float32
    assert_agree(got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("case", SMALL[:-1], ids=lambda case: case.name)
def test_agrees_with_the_recurrence(case: Case) -> None:
    """Odd lengths, groups, documents, states, with and without D: y, the final state and every gradient."""
    check(case, torch.float32)


@pytest.mark.parametrize("run", [1, 2, 3])
@pytest.mark.parametrize("case", RUNS, ids=lambda case: case.name)
def test_runs_of_chunks_in_two_passes(case: Case, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """States are the same wherever a program of their own begins; documents end on its borders and within it."""
    more = case.documents(DEVICE) | {"chunk_size": 16}
    at_once = results(scan.ssd, case.given(), torch.float32, device=DEVICE, **more)
    monkeypatch.setattr(ScanTiling, "run", lambda self: run)
    in_runs = results(scan.ssd, case.given(), torch.float32, device=DEVICE, **more)
    assert_agree(in_runs, exact(case, case.given()), 2e-5)
    assert_agree(in_runs, at_once, 5e-6)


def test_how_many_runs() -> None:
    """Two passes only where one has too few programs, and the chunks of a run make up for reading twice."""

    def run(batch: int, length: int, heads: int) -> int:
        x = torch.empty(batch, length, heads, 64, dtype=torch.bfloat16, device="meta")
        return scan_tiling(x, torch.empty(batch, length, 1, 128, device="meta"), None).run()

    assert run(1, 4096, 128) == run(2, 4096, 64) == 4096 // 128
    assert run(1, 4096, 16) == 4  # 16 programs become 128
    assert run(1, 131_072, 4) == 16  # 4 programs of 1,024 chunks become 256 of 16
    assert run(1, 1024, 4) == 1024 // 128  # too short


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    check(SMALL[-1], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_agrees_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.gpu
def test_bfloat16_is_as_close_as_plain_torch() -> None:
    """Plain torch multiplies in float32 and rounds its results; the kernels round operands as well. Not by much."""
    given = LARGE[0].given(torch.bfloat16)
    more = LARGE[0].documents(DEVICE)
    expected = exact(LARGE[0], given)
    for name, right in expected.items():
        errors = []
        for f in (scan.ssd, cpu.ssd):
            got = results(f, given, torch.float32, narrow=torch.bfloat16, device=DEVICE, **more)[name]
            errors.append((got.double() - right).norm() / right.norm())
        assert errors[0] < 4 * errors[1] + 1e-3, name


@pytest.mark.parametrize("decay", [1e-4, 30.0, 1e4])
def test_weak_and_strong_decay(decay: float) -> None:
    """From almost no forgetting to all at once: finite, and y and what does not pass through the decay exact."""
    case = Case("decay", 21, sizes={"batch": 1, "heads": 2, "groups": 1, "decay": decay})
    expected = results(naive.ssd, case.given(), torch.float64)
    got = results(scan.ssd, case.given(), torch.float32, device=DEVICE, chunk_size=16)
    assert all(t.isfinite().all() for t in got.values())
    assert_agree(got, {name: t for name, t in expected.items() if name not in ("ddt", "dA")}, 1e-5)
    terms = (expected["y"].abs().sum(-1) * case.given()["dt"]).sum()
    assert (got["dA"] - expected["dA"]).abs().max() < 1e-5 * terms
    assert (got["ddt"] - expected["ddt"]).abs().max() < 1e-5 * (terms * decay + expected["ddt"].abs().amax())


def test_zero_step_sizes_and_one_output() -> None:
    """dt = 0, and only y or only the state differentiated."""
    given = Case("zero", 18, sizes={"batch": 1, "heads": 2, "groups": 1}).given()
    given["dt"][0, 3:9] = 0
    for pick in (0, 1):
        found = []
        ours = partial(scan.ssd, chunk_size=16)
        for f, dtype in ((naive.ssd, torch.float64), (ours, torch.float32)):
            leaves = {name: t.to(DEVICE, dtype).requires_grad_() for name, t in given.items() if name not in ("C", "D")}
            rest = {name: given[name].to(DEVICE, dtype) for name in ("C", "D")}
            out = f(**leaves, **rest)[pick]
            found.append(torch.autograd.grad(out.double().square().sum(), list(leaves.values()), allow_unused=True))
        for right, got in zip(*found, strict=True):
            torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))


def test_documents_do_not_hear_each_other() -> None:
    """A loud document leaves no trace in the next ones, whatever the decay."""
    case = Case("loud", 40, ends=(5, 30), sizes={"batch": 1, "heads": 2, "groups": 1, "decay": 1e-6})
    given = {name: t.to(DEVICE, torch.float32) for name, t in case.given().items()}
    quiet, final = scan.ssd(**given, **case.documents(DEVICE), chunk_size=16)
    given["x"][:, :5] *= 1e20
    loud, loud_final = scan.ssd(**given, **case.documents(DEVICE), chunk_size=16)
    assert torch.equal(quiet[:, 5:], loud[:, 5:])
    assert torch.equal(final, loud_final)


def test_rows_of_one_projection(tmp_path: Path) -> None:
    """Tokens lie 2**26 elements apart, as those of a micro-batch of 131,072 tokens do in all: 32 bits overflow.

    The storage is a sparse file: what is not touched exists nowhere. A kernel that errs reads outside of it, and the
    process dies.
    """
    case = Case("far", 40, sizes={"batch": 1, "heads": 1, "channels": 4, "groups": 1, "state": 5})
    given = {name: t.float() for name, t in case.given().items()}
    expected = results(naive.ssd, case.given(), torch.float64)
    stride = 2**26
    if DEVICE == "cpu":
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=40 * stride, dtype=torch.float32)
    else:
        storage = torch.empty(40 * stride, device=DEVICE)
    start = 0
    for name in ("x", "B", "C", "dt"):
        size = given[name].shape[2:]
        far = storage.as_strided((1, 40, *size), (40 * stride, stride, *torch.empty(size).stride()), start)
        given[name] = far.copy_(given[name])
        start += 16
    given = {name: t.to(DEVICE).detach().requires_grad_() for name, t in given.items()}
    y, final = scan.ssd(**given, chunk_size=16)
    assert_agree({"y": y.detach().cpu(), "final": final.detach().cpu()}, {k: expected[k] for k in ("y", "final")}, 1e-5)
    generator = torch.Generator().manual_seed(1)
    loss: Any = sum((t.double().cpu() * torch.randn(t.shape, generator=generator).double()).sum() for t in (y, final))
    dx, dB = torch.autograd.grad(loss, [given["x"], given["B"]])
    leaves = {name: t.requires_grad_() for name, t in case.given().items()}
    generator = torch.Generator().manual_seed(1)
    right: Any = sum((t * torch.randn(t.shape, generator=generator).double()).sum() for t in naive.ssd(**leaves))
    right_dx, right_dB = torch.autograd.grad(right, [leaves["x"], leaves["B"]])
    assert_agree({"dx": dx.cpu(), "dB": dB.cpu()}, {"dx": right_dx, "dB": right_dB}, 1e-5)


def test_errors() -> None:
    given = {name: t.float() for name, t in inputs(4, heads=4, groups=3).items()}
    with pytest.raises(ConfigError, match="4 / 3"):
        scan.ssd(**given)
    with pytest.raises(ConfigError, match="at least one token"):
        scan.ssd(**{name: t.float() for name, t in inputs(0).items()})
    with pytest.raises(ConfigError, match="power of two"):
        scan.ssd(**{name: t.float() for name, t in inputs(4).items()}, chunk_size=24)
