"""The experts' linear layers, forward and backward, against formulas written out here."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from on_a_gpu import fake

from megatron_ext.platform import grouped_products
from megatron_ext.platform.grouped_linear import TorchColumnParallelGroupedLinear, TorchGroupedLinear


def make_linear(
    monkeypatch: pytest.MonkeyPatch, *, bias: bool, skip_bias_add: bool = False, sizes: tuple[int, int] = (5, 4)
) -> TorchGroupedLinear:
    """Three experts from 5 to 4 features, in float64, with random biases."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    config = SimpleNamespace(
        params_dtype=torch.float64, perform_initialization=False, expert_model_parallel_size=2,
        expert_tensor_parallel_size=1, tensor_model_parallel_size=1,
    )  # fmt: skip
    linear = TorchColumnParallelGroupedLinear(
        3, *sizes, config=config, init_method=torch.nn.init.normal_, bias=bias, skip_bias_add=skip_bias_add,
        is_expert=True, pg_collection=SimpleNamespace(expt_tp=None),
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_()
    return linear


@pytest.mark.parametrize("splits", [[2, 3, 1], [0, 6, 0], [0, 0, 0]])
@pytest.mark.parametrize("bias", [False, True])
def test_each_expert_has_its_own_rows(monkeypatch: pytest.MonkeyPatch, splits: list[int], bias: bool) -> None:
    linear = make_linear(monkeypatch, bias=bias)
    x = torch.randn(sum(splits), 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(sum(splits), 4, dtype=torch.float64)
    out, left = linear(x, splits)
    out.backward(upstream)
    assert left is None
    assert out.shape == (sum(splits), 4)
    row = 0
    for expert, count in enumerate(splits):
        weight, own = getattr(linear, f"weight{expert}"), slice(row, row + count)
        expected = torch.einsum("ti,oi->to", x[own], weight)
        if bias:
            expected = expected + getattr(linear, f"bias{expert}")
            torch.testing.assert_close(getattr(linear, f"bias{expert}").grad, upstream[own].sum(0))
        torch.testing.assert_close(out[own], expected)
        assert x.grad is not None
        torch.testing.assert_close(x.grad[own], torch.einsum("to,oi->ti", upstream[own], weight))
        torch.testing.assert_close(weight.grad, torch.einsum("to,ti->oi", upstream[own], x[own]))
        row += count


def test_biases_can_be_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = make_linear(monkeypatch, bias=True, skip_bias_add=True)
    x = torch.randn(3, 5, dtype=torch.float64)
    out, biases = linear(x, [1, 1, 1])
    expected = torch.stack([x[i] @ getattr(linear, f"weight{i}").T for i in range(3)])
    torch.testing.assert_close(out, expected)
    assert biases is not None
    assert all(biases[i] is getattr(linear, f"bias{i}") for i in range(3))


def test_a_checkpoint_has_a_state_per_expert_and_torch_one_per_module(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, other = make_linear(monkeypatch, bias=False), make_linear(monkeypatch, bias=False)
    saved = linear.state_dict() | {"_extra_state1": None, "_extra_state2": None}
    saved["weight1"] = torch.ones(4, 5, dtype=torch.float64)
    other.load_state_dict(saved)
    assert torch.equal(other.get_parameter("weight1"), saved["weight1"])
    assert not any(parameter.allreduce for parameter in other.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("splits", [[2, 3, 1], [0, 6, 0], [0, 0, 5]])
def test_one_operation_is_the_same_layer(monkeypatch: pytest.MonkeyPatch, splits: list[int]) -> None:
    """Torch has it for a CPU as well, up to 32 bits."""
    linear = make_linear(monkeypatch, bias=False, sizes=(8, 4)).float()
    x, upstream = torch.randn(sum(splits), 8, requires_grad=True), torch.randn(1, 4).expand(sum(splits), 4)
    found: list[list[torch.Tensor]] = []
    operation, calls = F.grouped_mm, []
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or operation(*args, **kwargs))
    for together in (False, True):
        monkeypatch.setattr(grouped_products, "together", lambda *_, together=together: together)
        leaves = [x, *linear.parameters()]
        out, biases = linear(x, splits)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
        assert biases is None
        assert len(calls) == 2 * together
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"capability": (8, 0)}, False),  # torch itself goes through the experts
        ({"device": "cpu"}, False),
        ({"dtype": torch.float32}, False),
        ({"features": 100}, False),
        ({"tokens": 2**17}, False),  # each expert fills the GPU by itself
    ],
)
def test_small_experts_go_together(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: bool) -> None:
    of = {"capability": (9, 0), "device": "cuda", "dtype": torch.bfloat16, "features": 1024, "tokens": 4096} | changes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: of["capability"])
    kind: Any = {"device": of["device"], "dtype": of["dtype"]}
    x, weights = fake(of["tokens"], 2048, **kind), [fake(of["features"], 2048, **kind)] * 16
    assert grouped_products.together(x, weights) == expected


@pytest.mark.gpu
def test_one_operation_on_a_gpu() -> None:
    torch.manual_seed(1)
    weights = [torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(4)]
    splits = [5, 0, 130, 9]
    x = torch.randn(sum(splits), 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream, leaves = torch.randn(len(x), 64, device="cuda", dtype=torch.bfloat16), [x, *weights]
    out = grouped_products.grouped_products(x, splits, weights)
    expected = torch.cat([F.linear(*pair) for pair in zip(x.split(splits), weights, strict=True)])
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    pairs = zip(
        torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    )
    for own, theirs in pairs:
        torch.testing.assert_close(own, theirs, rtol=2e-2, atol=2e-1)
