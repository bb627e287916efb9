"""Convolution, scan, norm and gate in one function of plain torch, against their definitions in float64."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixer_oracle import CHANNELS, HEADS, INNER, PROJECTION, leaves, outcomes
from ssm_oracle import assert_agree
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.ops.cache_blocks import BLOCK_ELEMENTS
from megatron_ext.ops.mamba_mixer import naive
from megatron_ext.ops.mamba_mixer.cpu import conv_scan_norm
from megatron_ext.ops.ssd import cpu_chunks

by_definition = partial(naive.conv_scan_norm, projection=PROJECTION)
ours = partial(conv_scan_norm, projection=PROJECTION)


def documents(batch: int, length: int, seed: int) -> Tensor:
    """Document numbers that grow along each row, by more than one at times."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, (batch, length), generator=generator).sort(1).values.int()


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40),
    chunk_size=st.integers(1, 17),
    budget=st.sampled_from([1, 300, 1 << 20]),
    norm=st.sampled_from([None, True, False]),
    layout=st.tuples(*[st.booleans()] * 5),
    seed=st.integers(0, 2**16),
)
def test_any_shape_chunk_and_block(
    length: int, chunk_size: int, budget: int, norm: bool | None, layout: tuple[bool, ...], seed: int
) -> None:
    """Every gradient, whatever the blocks, the documents, the state before and the rest of the layout."""
    packed, initial, per_channel, limited, whole_batch = layout
    batch = 1 + seed % 3
    given = leaves(length, batch=batch, per_channel=per_channel, initial=initial, normed=norm is not None)
    how = {
        "seq_idx": documents(batch, length, seed) if packed else None,
        "dt_limit": (0.3, 1.2) if limited else (0.0, float("inf")),
        "norm_eps": 1e-2,
        "norm_before_gate": bool(norm),
    }
    expected = outcomes(partial(by_definition, **how), given, torch.float64, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLOCK_ELEMENTS, "cpu", budget)
        if whole_batch:
            patch.setattr(cpu_chunks, "rows_per_block", lambda rows, device: rows)
        got = outcomes(partial(ours, **how, chunk_size=chunk_size), given, torch.float64, "cpu")
    # without a past that decays there is no gradient for A to be relative to
    torch.testing.assert_close(got.pop("dA"), expected.pop("dA"), rtol=1e-8, atol=1e-8)
    assert_agree(got, expected, 1e-8)


@pytest.mark.parametrize("norm", [None, True, False])
def test_float32(norm: bool | None) -> None:
    given = leaves(70, batch=2, normed=norm is not None, biased=False)
    how = {"norm_before_gate": bool(norm), "activation": None}
    expected = outcomes(partial(by_definition, **how), given, torch.float64, "cpu")
    got = outcomes(partial(ours, **how), given, torch.float32, "cpu")
    name = "ddt_bias"  # a sum over all tokens of terms that cancel
    assert_agree({name: got.pop(name)}, {name: expected.pop(name)}, 1e-4)
    assert_agree(got, expected, 1e-5)


@pytest.mark.parametrize("norm", [None, True, False])
def test_bfloat16_is_rounded_once(norm: bool | None) -> None:
    """All sums are in float32: the results are those of the rounded inputs, rounded."""
    given = {name: t if t is None else t.bfloat16() for name, t in leaves(37, normed=norm is not None).items()}
    how = {"norm_before_gate": bool(norm)}
    got = outcomes(partial(ours, **how), given, torch.bfloat16, "cpu")
    expected = outcomes(partial(ours, **how), given, torch.float32, "cpu")
    kinds = {name: t.dtype for name, t in got.items()}
    assert kinds.pop("1") == torch.float32  # the final state
    assert set(kinds.values()) == {torch.bfloat16}
    assert_agree({name: t.float() for name, t in got.items()}, expected, 2**-8)


def test_only_the_output_or_only_the_state() -> None:
    """A gradient that does not arrive is none: not an error, and not something else."""
    given = leaves(11, normed=True)
    for which in (0, 1):
        expected = outcomes(lambda which=which, **own: by_definition(**own)[which], given, torch.float64, "cpu")
        got = outcomes(lambda which=which, **own: ours(**own)[which], given, torch.float64, "cpu")
        assert_agree(got, expected, 1e-9)


@pytest.mark.parametrize("whole_batch", [False, True])
@pytest.mark.parametrize("norm", [None, True, False])
def test_inputs_of_any_layout(monkeypatch: pytest.MonkeyPatch, norm: bool | None, whole_batch: bool) -> None:
    """A projection and a gradient that are views of something else, as Megatron's (l, b, d) made (b, l, d)."""
    if whole_batch:
        monkeypatch.setattr(cpu_chunks, "rows_per_block", lambda rows, device: rows)
    own = {name: t for name, t in leaves(19, batch=2, normed=norm is not None).items() if t is not None}
    own["norm_before_gate"] = bool(norm)  # type: ignore[assignment]
    zxbcdt = own.pop("zxbcdt").transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    dy = torch.randn(INNER, 2, 19, dtype=torch.float64).permute(1, 2, 0)
    y, _ = ours(zxbcdt, **own, chunk_size=4)
    assert y.transpose(0, 1).is_contiguous(), "what goes back into (l, b, d) is in that order"
    (got,) = torch.autograd.grad(y, zxbcdt, dy)
    straight = zxbcdt.detach().contiguous().requires_grad_()
    expected = ours(straight, **own, chunk_size=4)[0]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (right,) = torch.autograd.grad(expected, straight, dy.contiguous())
    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


def test_expanded_gradient() -> None:
    """What `y.sum().backward()` hands in: one number with strides of zero."""
    own = {name: t for name, t in leaves(19, normed=True).items() if t is not None}
    zxbcdt = own.pop("zxbcdt").requires_grad_()
    got = torch.autograd.grad(ours(zxbcdt, **own)[0].sum(), zxbcdt)[0]
    y = ours(zxbcdt, **own)[0]
    torch.testing.assert_close(got, torch.autograd.grad(y, zxbcdt, torch.ones_like(y))[0], rtol=1e-12, atol=1e-12)


def test_memory_is_linear_in_the_sequence() -> None:
    """What is kept for the backward grows with the length, and is the projection, y, and what is small beside them."""

    def kept(length: int) -> int:
        found: dict[int, int] = {}

        def count(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            return t

        given: dict[str, Any] = {
            n: t if t is None else t.float().requires_grad_() for n, t in leaves(length, normed=True).items()
        }
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            ours(**given)
        return sum(found.values())

    base, double, fourfold = kept(256), kept(512), kept(1024)
    assert fourfold - double == 2 * (double - base) > 0


def test_every_tensor_is_made_on_the_device_of_the_inputs() -> None:
    """On the meta device: any other tensor that takes part would raise."""
    given = {
        n: t.to("meta").requires_grad_() for n, t in leaves(37, initial=True, normed=True).items() if t is not None
    }
    y, final = ours(**given, seq_idx=torch.zeros(1, 37, dtype=torch.int32, device="meta"))
    assert (y.shape, final.shape[:3]) == ((1, 37, INNER), (1, HEADS, CHANNELS))
    gradients = torch.autograd.grad((y.sum(), final.sum()), list(given.values()))
    assert all(g.is_meta and g.shape == t.shape for g, t in zip(gradients, given.values(), strict=True))


def test_errors() -> None:
    given = {name: t for name, t in leaves(4).items() if t is not None}
    with pytest.raises(ConfigError, match="relu"):
        ours(**given, activation="relu")
