"""One token at a time in Triton, against the torch step in float64 and against the whole sequence."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.ops import mamba_ssm_api
from megatron_ext.ops.dispatch import set_backend
from megatron_ext.ops.ssd.triton_decode import state_step

api: Any = mamba_ssm_api  # an argument says whether it returns one tensor or two
pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, HEADS, CHANNELS, GROUPS, STATE = 2, 4, 20, 2, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double().cpu(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("full", [False, True])
def test_state(full: bool) -> None:
    state, x, dt = (
        normal(5, HEADS, CHANNELS, STATE),
        normal(BATCH, HEADS, CHANNELS, seed=1),
        normal(BATCH, HEADS, seed=2),
    )
    A, B, C = -normal(HEADS, seed=3).exp(), normal(BATCH, GROUPS, STATE, seed=4), normal(BATCH, GROUPS, STATE, seed=5)
    D, z, bias = normal(HEADS, seed=6), normal(BATCH, HEADS, CHANNELS, seed=7), normal(HEADS, seed=8)
    slots = torch.tensor([4, 0]) if full else None
    state = state if full else state[:BATCH].contiguous()

    def call(f, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        own = state.to(device, dtype, copy=True)
        wide = (HEADS, CHANNELS)
        given = [t.to(device, dtype) for t in (x, dt, A, B, C)]
        given[1] = given[1].unsqueeze(-1).expand(-1, *wide)
        given[2] = given[2][:, None, None].expand(*wide, STATE)
        more = [t.to(device, dtype) for t in (D, z, bias)]
        optional = (more[0][:, None].expand(wide), more[1], more[2][:, None].expand(wide), True) if full else ()
        return f(own, *given, *optional, **({} if slots is None else {names[f]: slots.to(device)})), own

    names = {state_step: "slots", api.selective_state_update: "state_batch_indices"}
    for got, expected in zip(
        call(state_step, torch.float32, DEVICE), call(api.selective_state_update, torch.float64, "cpu"), strict=True
    ):
        close(got, expected)


def test_token_by_token_is_the_sequence() -> None:
    """Through the functions Megatron calls; with the state in bfloat16, which the interpreter rounds towards zero."""
    set_backend("triton")
    try:
        x, weight = normal(BATCH, 3, 6).to(DEVICE), normal(6, 4, seed=1).to(DEVICE)
        window = torch.zeros(BATCH, 6, 4, device=DEVICE)
        steps = [api.causal_conv1d_update(x[:, t].float(), window, weight.float()) for t in range(3)]
        close(torch.stack(steps, 1), api.causal_conv1d_fn(x.mT.float(), weight.float()).mT.double().cpu())
        state = torch.zeros(BATCH, HEADS, CHANNELS, STATE, dtype=torch.bfloat16, device=DEVICE)
        wide = normal(BATCH, 2 * HEADS * CHANNELS).bfloat16().to(DEVICE)
        token = wide[:, HEADS * CHANNELS :].unflatten(1, (HEADS, CHANNELS))
        ones, B = torch.ones(BATCH, HEADS, CHANNELS, device=DEVICE), normal(BATCH, GROUPS, STATE).to(DEVICE).bfloat16()
        A = -torch.ones(HEADS, CHANNELS, STATE, device=DEVICE)
        y = api.selective_state_update(state, token, ones, A, B, B)
    finally:
        set_backend("auto")
    exact = torch.einsum("bhp,bhn->bhpn", token.double().cpu(), B.double().cpu().repeat_interleave(2, 1))
    torch.testing.assert_close(state.double().cpu(), exact, rtol=2**-7, atol=1e-6)
    expected = torch.einsum("bhpn,bhn->bhp", exact, B.double().cpu().repeat_interleave(2, 1))
    torch.testing.assert_close(y.double().cpu(), expected, rtol=2**-7, atol=1e-6)
