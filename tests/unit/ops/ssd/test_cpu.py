"""The chunked scan against the recurrence: forward and every gradient, at every awkward length, decay and layout."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssm_oracle import assert_agree, inputs, results
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.ops.cache_blocks import BLOCK_ELEMENTS
from megatron_ext.ops.ssd import cpu, cpu_chunks, naive


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 31])
@pytest.mark.parametrize("skip_per_channel", [False, True])
def test_lengths_around_chunk_borders(length: int, skip_per_channel: bool) -> None:
    given = inputs(length, skip_per_channel=skip_per_channel)
    expected = results(naive.ssd, given, torch.float64)
    assert_agree(results(cpu.ssd, given, torch.float64, chunk_size=8), expected, 1e-10)
    assert_agree(results(cpu.ssd, given, torch.float32, chunk_size=8), expected, 2e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups(groups: int) -> None:
    given = inputs(21, groups=groups)
    assert_agree(results(cpu.ssd, given, torch.float64, chunk_size=8), results(naive.ssd, given, torch.float64), 1e-10)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 40),
    size=st.integers(1, 17),
    layout=st.sampled_from([(1, 1), (2, 1), (2, 2), (6, 3)]),
    seed=st.integers(0, 2**16),
    documents=st.booleans(),
)
def test_any_shape_and_chunk(length: int, size: int, layout: tuple[int, int], seed: int, documents: bool) -> None:
    heads, groups = layout
    given = inputs(length, heads=heads, groups=groups, seed=seed, batch=1 + seed % 3)
    more = {}
    if documents:
        generator = torch.Generator().manual_seed(seed)
        more["seq_idx"] = torch.randint(0, 4, given["x"].shape[:2], generator=generator).sort(1).values
    expected = results(naive.ssd, given, torch.float64, **more)
    assert_agree(results(cpu.ssd, given, torch.float64, chunk_size=size, **more), expected, 1e-9)


@pytest.mark.parametrize("decay", [1e-4, 1.0, 30.0, 1e4])
def test_weak_and_strong_decay(decay: float) -> None:
    """Sums of log-decays from almost nothing to far below what a float32 exponential can hold.

    The gradient of a log-decay is a difference of terms like dy.y, so its error is measured against those: where the
    state is forgotten at once, the gradient itself is next to nothing.
    """
    given = inputs(70, decay=decay)
    expected = results(naive.ssd, given, torch.float64)
    got = results(cpu.ssd, given, torch.float32)
    assert all(t.isfinite().all() for t in got.values())
    through_log = ("ddt", "dA")
    assert_agree(got, {name: t for name, t in expected.items() if name not in through_log}, 2e-6)
    terms = expected["y"].abs().sum(-1)
    error = {name: (got[name] - expected[name]).abs() for name in through_log}
    assert (error["dA"] < 2e-6 * (terms * given["dt"]).sum((0, 1))).all()
    assert (error["ddt"] < 2e-6 * (terms.amax() * given["A"].abs() + expected["ddt"].abs().amax())).all()


def test_zero_step_sizes() -> None:
    """dt = 0: a token leaves the state alone, and yet y depends on that dt."""
    given = inputs(20)
    given["dt"][0, 3:9] = 0
    given["dt"][1] = 0
    expected = results(naive.ssd, given, torch.float64)
    assert expected["ddt"][0, 3:9].abs().min() > 1e-6
    assert_agree(results(cpu.ssd, given, torch.float64, chunk_size=8), expected, 1e-10)
    assert_agree(results(cpu.ssd, given, torch.float32, chunk_size=8), expected, 2e-5)


def test_gradcheck() -> None:
    given = inputs(7, batch=1, heads=2, channels=2, groups=1, state=2)
    leaves = [t.requires_grad_() for t in given.values()]
    torch.autograd.gradcheck(lambda *a: cpu.ssd(*a, chunk_size=3), leaves)


def test_bfloat16_accumulates_in_float32() -> None:
    """Inputs are rounded to bfloat16; from there on only the outputs are."""
    given = {name: t.bfloat16().double() for name, t in inputs(100).items()}
    got = results(cpu.ssd, given, torch.bfloat16)
    assert {got[name].dtype for name in ("y", "dx", "ddt", "dA", "dB", "dC", "dD")} == {torch.bfloat16}
    assert got["final"].dtype == torch.float32
    expected = results(naive.ssd, given, torch.float64)
    assert_agree({"final": got["final"]}, {"final": expected["final"]}, 1e-6)
    assert_agree(got, expected, 2**-8)


def test_only_the_state_and_only_y() -> None:
    """Either output alone may be differentiated."""
    given = inputs(12)
    for pick in (0, 1):
        gradients = []
        for scan in (naive.ssd, cpu.ssd):
            leaves = [t.clone().requires_grad_() for name, t in given.items() if name not in ("C", "D")]
            x, dt, A, B, initial = leaves
            out = scan(x, dt, A, B, given["C"], given["D"], initial)[pick]
            gradients.append(torch.autograd.grad(out.square().sum(), leaves))
        for right, got in zip(*gradients, strict=True):
            torch.testing.assert_close(got, right)


def test_the_state_carries_on() -> None:
    """Two halves, the state handed over, are the whole."""
    given = inputs(50)
    whole, final = cpu.ssd(**given)
    sequence = ("x", "dt", "B", "C")
    first = {name: t[:, :23] if name in sequence else t for name, t in given.items()}
    second = {name: t[:, 23:] if name in sequence else t for name, t in given.items()}
    y1, state = cpu.ssd(**first)
    second["initial_states"] = state
    y2, last = cpu.ssd(**second)
    torch.testing.assert_close(torch.cat([y1, y2], 1), whole)
    torch.testing.assert_close(last, final)


def test_documents_do_not_see_each_other() -> None:
    """A packed row is its documents one by one, wherever they end, and a loud one is not heard through a weak decay."""
    given = inputs(60, batch=1, decay=1e-6)
    given["x"][:, :5] *= 1e20
    ends = [0, 5, 32, 33, 60]
    seq_idx = torch.cat([torch.full((1, b - a), i) for i, (a, b) in enumerate(pairwise(ends))], 1)
    y, final = cpu.ssd(**given, seq_idx=seq_idx, chunk_size=16)
    state = final
    for i, (start, end) in enumerate(pairwise(ends)):
        own = {name: t[:, start:end] if name in ("x", "dt", "B", "C") else t for name, t in given.items()}
        if i > 0:
            del own["initial_states"]
        alone, state = cpu.ssd(**own)
        torch.testing.assert_close(y[:, start:end], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(final, state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("whole_batch", [False, True])
@pytest.mark.parametrize("budget", [1, 200, 1 << 20])
def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, budget: int, whole_batch: bool) -> None:
    """One chunk at a time or many, one row at a time (as on a CPU) or all (as on a GPU)."""
    given = inputs(37)
    expected = results(cpu.ssd, given, torch.float64, chunk_size=4)
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", budget)
    if whole_batch:
        monkeypatch.setattr(cpu_chunks, "rows_per_block", lambda rows, device: rows)
    assert_agree(results(cpu.ssd, given, torch.float64, chunk_size=4), expected, 1e-12)


def test_every_tensor_is_made_on_the_device_of_the_inputs() -> None:
    """On the meta device: any other tensor that takes part would raise."""
    given = {name: t.to("meta").requires_grad_() for name, t in inputs(37).items()}
    seq_idx = torch.zeros(2, 37, dtype=torch.int32, device="meta")
    y, final = cpu.ssd(**given, seq_idx=seq_idx)
    assert (y.shape, final.shape) == (given["x"].shape, given["initial_states"].shape)
    gradients = torch.autograd.grad((y.sum(), final.sum()), list(given.values()))
    assert all(g.is_meta and g.shape == t.shape for g, t in zip(gradients, given.values(), strict=True))


def test_memory_is_linear_in_the_sequence() -> None:
    """What is kept for the backward grows with the length, not with its square."""

    def kept(length: int) -> int:
        total = 0

        def count(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            cpu.ssd(**{name: t.float().requires_grad_() for name, t in inputs(length).items()})
        return total

    base, double, fourfold = kept(256), kept(512), kept(1024)
    assert fourfold - double == 2 * (double - base) > 0


def test_errors() -> None:
    given = inputs(4, heads=4, groups=3)
    with pytest.raises(ConfigError, match="4 / 3"):
        cpu.ssd(**given)
    with pytest.raises(ConfigError, match="at least one token"):
        cpu.ssd(**inputs(0))
