"""SiLU and its derivative against autograd in float64."""

import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.ops.silu import is_silu, silu, silu_and_derivative


@pytest.mark.parametrize("in_place", [False, True])
def test_value_and_derivative_are_autograds(in_place: bool) -> None:
    z = torch.linspace(-30, 30, 61, dtype=torch.float64)
    exact = z.clone().requires_grad_()
    expected = torch.nn.functional.silu(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    given = z.clone()
    value, derivative = silu_and_derivative(given, in_place)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(derivative, slope)
    assert given.equal(value if in_place else z)
    torch.testing.assert_close(silu(z), expected.detach())


def test_another_activation_is_refused() -> None:
    assert [is_silu(name) for name in (None, "silu", "swish")] == [False, True, True]
    with pytest.raises(ConfigError, match="gelu"):
        is_silu("gelu")


def test_in_fp32_no_exponential_is_too_large() -> None:
    z = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])
    value, derivative = silu_and_derivative(z)
    torch.testing.assert_close(value, torch.nn.functional.silu(z))
    assert value.equal(silu(z))
    assert derivative.tolist() == [0.0, derivative[1], 0.5, 1.0, 1.0]
