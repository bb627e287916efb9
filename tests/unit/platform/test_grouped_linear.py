"""The experts' linear layers, forward and backward, against formulas written out here."""

from types import SimpleNamespace

import pytest
import torch

from megatron_ext.platform.grouped_linear import TorchColumnParallelGroupedLinear, TorchGroupedLinear


def make_linear(monkeypatch: pytest.MonkeyPatch, *, bias: bool, skip_bias_add: bool = False) -> TorchGroupedLinear:
    """Three experts from 5 to 4 features, in float64, with random biases."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    config = SimpleNamespace(
        params_dtype=torch.float64, perform_initialization=False, expert_model_parallel_size=2,
        expert_tensor_parallel_size=1, tensor_model_parallel_size=1,
    )  # fmt: skip
    linear = TorchColumnParallelGroupedLinear(
        3, 5, 4, config=config, init_method=torch.nn.init.normal_, bias=bias, skip_bias_add=skip_bias_add,
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
