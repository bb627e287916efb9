"""The blocked scan and the exportable one against the recurrence, and the recurrence against a closed formula."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from selective_oracle import inputs, results
from ssm_oracle import assert_agree
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.ops.cache_blocks import BLOCK_ELEMENTS
from megatron_ext.ops.selective_scan import cpu, exportable, naive

FORMS: list[Callable] = [cpu.selective_scan, exportable.selective_scan]
FORM = pytest.mark.parametrize("scan", FORMS, ids=["cpu", "exportable"])


def test_the_recurrence_is_the_sum_over_the_past() -> None:
    """y_t = sum_{s <= t} C_t exp(A sum_{s < r <= t} dt_r) dt_s x_s B_s + D x_t, an l x l kernel for each channel."""
    given = inputs(11)
    x, A, B, C = (given[name] for name in ("x", "A", "B", "C"))
    dt = F.softplus(given["dt"] + given["dt_bias"])
    sums = dt.cumsum(1)
    between = (sums[:, :, None] - sums[:, None])[..., None] * A  # (b, t, s, d, n)
    past = torch.ones(11, 11).tril().bool()[None, :, :, None, None]
    weights = torch.where(past, between.exp(), 0.0)
    y = torch.einsum("btn,btsdn,bsd,bsn->btd", C, weights, dt * x, B)
    y = y + torch.einsum("btn,btdn,bdn->btd", C, (sums[..., None] * A).exp(), given["initial_states"])
    y = (y + given["D"] * x) * F.silu(given["z"])
    torch.testing.assert_close(naive.selective_scan(**given, dt_softplus=True)[0], y)


@FORM
@pytest.mark.parametrize("length", [1, 7, 8, 9, 17, 31])
def test_lengths_around_chunk_borders(scan: Callable, length: int) -> None:
    given = inputs(length)
    more = {"chunk_size": 8} if scan is cpu.selective_scan else {}
    expected = results(naive.selective_scan, given, torch.float64)
    assert_agree(results(scan, given, torch.float64, **more), expected, 1e-10)
    assert_agree(results(scan, given, torch.float32, **more), expected, 2e-5)


@FORM
@pytest.mark.parametrize("absent", [("D",), ("z",), ("dt_bias",), ("initial_states",), ("D", "z", "dt_bias")], ids=str)
def test_what_may_be_absent(scan: Callable, absent: tuple[str, ...]) -> None:
    given = inputs(13, absent=absent)
    assert_agree(results(scan, given, torch.float64), results(naive.selective_scan, given, torch.float64), 1e-10)


@FORM
def test_step_sizes_as_they_are(scan: Callable) -> None:
    """Without softplus, as a caller has them, zero among them: a token then leaves the state alone."""
    given = inputs(13, absent=("dt_bias",))
    given["dt"] = given["dt"].abs()
    given["dt"][:, 3:6] = 0
    expected = results(naive.selective_scan, given, torch.float64, dt_softplus=False)
    assert_agree(results(scan, given, torch.float64, dt_softplus=False), expected, 1e-10)


@FORM
@pytest.mark.parametrize("decay", [1e-4, 30.0, 1e4])
def test_weak_and_strong_decay(scan: Callable, decay: float) -> None:
    """From almost no forgetting to all at once, where a formula that divides by decays would overflow."""
    given = inputs(70, decay=decay)
    got = results(scan, given, torch.float32)
    assert all(t.isfinite().all() for t in got.values())
    assert_agree(got, results(naive.selective_scan, given, torch.float64), 2e-5)


def test_gradcheck() -> None:
    given = inputs(5, batch=1, channels=2, state=2)
    leaves = {name: t.requires_grad_() for name, t in given.items()}
    torch.autograd.gradcheck(
        lambda *a: cpu.selective_scan(**dict(zip(leaves, a, strict=True)), dt_softplus=True, chunk_size=2),
        list(leaves.values()),
    )


@FORM
def test_rows_do_not_see_each_other(scan: Callable) -> None:
    """A batch in reverse is the results in reverse."""
    given = inputs(20, batch=3)
    shared = ("A", "D", "dt_bias")
    turned = {name: t if name in shared else t.flip(0) for name, t in given.items()}
    y, final = scan(**given, dt_softplus=True)
    y_turned, final_turned = scan(**turned, dt_softplus=True)
    assert torch.equal(y_turned.flip(0), y)
    assert torch.equal(final_turned.flip(0), final)


@FORM
def test_the_state_carries_on(scan: Callable) -> None:
    """Two parts, the state handed over, are the whole."""
    given = inputs(50)
    whole, final = scan(**given, dt_softplus=True)
    sequence = ("x", "dt", "B", "C", "z")
    first = {name: t[:, :23] if name in sequence else t for name, t in given.items()}
    second = {name: t[:, 23:] if name in sequence else t for name, t in given.items()}
    y1, state = scan(**first, dt_softplus=True)
    y2, last = scan(**(second | {"initial_states": state}), dt_softplus=True)
    torch.testing.assert_close(torch.cat([y1, y2], 1), whole)
    torch.testing.assert_close(last, final)


@pytest.mark.parametrize("budget", [1, 200])
def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """One row at a time, or some."""
    given = inputs(37, batch=5)
    expected = results(cpu.selective_scan, given, torch.float64)
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", budget)
    assert_agree(results(cpu.selective_scan, given, torch.float64, chunk_size=4), expected, 1e-12)


def test_either_output_alone_and_16_bits() -> None:
    given = inputs(12)
    for pick in (0, 1):
        gradients = []
        for scan in (naive.selective_scan, cpu.selective_scan):
            leaves = [t.clone().requires_grad_() for t in given.values()]
            out = scan(**dict(zip(given, leaves, strict=True)), dt_softplus=True)[pick]
            gradients.append(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True))
        for right, got in zip(*gradients, strict=True):
            torch.testing.assert_close(got, right)
    given = {name: t.bfloat16().double() for name, t in inputs(100).items()}
    got = results(cpu.selective_scan, given, torch.float32, narrow=torch.bfloat16)
    assert got["y"].dtype == got["dx"].dtype == got["ddt"].dtype == got["dB"].dtype == torch.bfloat16
    assert got["final"].dtype == got["dA"].dtype == torch.float32
    assert_agree(got, results(naive.selective_scan, given, torch.float64), 2**-7)


def test_memory_is_linear_in_the_sequence() -> None:
    """What is projected, its gradients, the gate and one state a chunk, together ten times x: no states of all."""
    few, many = _peak_bytes(64), _peak_bytes(512)
    own, states = 512 * 32 * 4, 512 * 32 * 16 * 4  # of x, and of the states of all tokens, float32
    assert many - few < 10 * own < states
    assert _peak_bytes(128, naive.selective_scan) > 2 * states / 4


def _peak_bytes(length: int, scan: Callable = cpu.selective_scan) -> int:
    """The most bytes alive at once in one forward and backward, inputs not counted, by torch's profiler."""
    given = {name: t.float().requires_grad_() for name, t in inputs(length, batch=1, channels=32, state=16).items()}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        y, final = scan(**given, dt_softplus=True)
        (y.sum() + final.sum()).backward()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = peak = 0
    for _, size in moves:
        alive += size
        peak = max(peak, alive)
    return peak


def test_every_tensor_is_made_on_the_device_of_the_inputs() -> None:
    given = {name: t.to("meta").requires_grad_() for name, t in inputs(37).items()}
    y, final = cpu.selective_scan(**given, dt_softplus=True)
    gradients: tuple[Tensor, ...] = torch.autograd.grad((y.sum(), final.sum()), list(given.values()))
    assert all(g.is_meta and g.shape == t.shape for g, t in zip(gradients, given.values(), strict=True))


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        cpu.selective_scan(**inputs(0))
