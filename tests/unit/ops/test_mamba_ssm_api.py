"""The functions Megatron calls, against transformers' Mamba-2 and against each other, with every backend."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from megatron_ext.errors import ConfigError
from megatron_ext.ops import mamba_ssm_api
from megatron_ext.ops.dispatch import set_backend

api: Any = mamba_ssm_api  # an argument says whether it returns one tensor or two
HIDDEN, HEADS, HEAD_DIM, STATE, GROUPS = 32, 8, 8, 16, 2
INNER = HEADS * HEAD_DIM


@pytest.fixture(params=["naive", "torch"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    set_backend(request.param)
    yield request.param
    set_backend("auto")


def mixer(**changes: Any) -> Mamba2Mixer:
    """transformers' mixer with every parameter at random."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_heads": HEADS, "head_dim": HEAD_DIM, "state_size": STATE, "n_groups": GROUPS}
    config = Mamba2Config(hidden_size=HIDDEN, expand=2, num_hidden_layers=1, chunk_size=16, **(sizes | changes))
    module = Mamba2Mixer(config, 0)
    with torch.no_grad():
        for parameter in (module.D, module.dt_bias, module.norm.weight, module.conv1d.bias):
            assert parameter is not None
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.double()


def ours(module: Mamba2Mixer, hidden: Tensor, **more: Any) -> Tensor:
    """The same mixer through our function."""
    return api.mamba_split_conv1d_scan_combined(
        module.in_proj(hidden),
        module.conv1d.weight.squeeze(1),
        module.conv1d.bias,
        module.dt_bias,
        -module.A_log.exp(),
        more.pop("D", module.D),
        chunk_size=module.chunk_size,
        dt_limit=module.time_step_limit,
        rmsnorm_weight=module.norm.weight,
        rmsnorm_eps=module.norm.variance_epsilon,
        outproj_weight=module.out_proj.weight,
        outproj_bias=module.out_proj.bias,
        headdim=HEAD_DIM,
        ngroups=GROUPS,
        norm_before_gate=False,
        **more,
    )


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.2, 0.9)])
@pytest.mark.parametrize("length", [2, 45])
def test_mixer_agrees_with_transformers(kernels: str, length: int, limit: tuple[float, float]) -> None:
    """Forward to 1e-6 (transformers rounds A and the norm to float32), and the gradient of every parameter."""
    module = mixer(time_step_limit=limit)
    hidden = torch.randn(2, length, HIDDEN, dtype=torch.float64, requires_grad=True)
    leaves = {"hidden": hidden, **dict(module.named_parameters())}
    weights = torch.randn(2, length, HIDDEN, dtype=torch.float64)
    outcomes = []
    for forward in (module, lambda h: ours(module, h)):
        y = forward(hidden)
        outcomes.append([y, *torch.autograd.grad((y * weights).sum(), list(leaves.values()))])
    for name, right, got in zip(["y", *leaves], *outcomes, strict=True):
        error = (right - got).abs().max() / right.abs().max().clamp_min(1e-30)
        assert error < 3e-5, f"{name}: {error:.1e}"


def test_split_is_its_parts(kernels: str) -> None:
    """Without norm and projection, with D per channel, from an initial state: convolution, then scan with the gate."""
    torch.manual_seed(0)
    conv_dim = INNER + 2 * GROUPS * STATE
    zxbcdt = torch.randn(2, 20, INNER + conv_dim + HEADS, dtype=torch.float64)
    weight, bias = torch.randn(conv_dim, 4).double(), torch.randn(conv_dim).double()
    dt_bias, A, D = torch.randn(HEADS).double(), -torch.rand(HEADS).double(), torch.randn(HEADS, HEAD_DIM).double()
    initial = torch.randn(2, HEADS, HEAD_DIM, STATE).double()
    z, xbc, dt = zxbcdt.split([INNER, conv_dim, HEADS], -1)
    xbc = api.causal_conv1d_fn(xbc.mT, weight, bias, activation="swish").mT
    x, B, C = xbc.split([INNER, GROUPS * STATE, GROUPS * STATE], -1)
    shapes = {"x": (HEADS, HEAD_DIM), "B": (GROUPS, STATE), "C": (GROUPS, STATE)}
    x, B, C = (t.unflatten(-1, shape) for t, shape in zip((x, B, C), shapes.values(), strict=True))
    bare, state = api.mamba_chunk_scan_combined(
        x, F.softplus(dt + dt_bias), A, B, C, 8, D, initial_states=initial, return_final_states=True
    )
    expected = bare * F.silu(z.unflatten(-1, (HEADS, HEAD_DIM)))
    gated = api.mamba_chunk_scan_combined(
        x, dt, A, B, C, 8, D, z.unflatten(-1, (HEADS, HEAD_DIM)), dt_bias, initial, dt_softplus=True
    )
    torch.testing.assert_close(gated, expected)
    y, final = api.mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, A, D, 8, initial, ngroups=GROUPS, return_final_states=True, state_dtype=None
    )
    torch.testing.assert_close(y, expected.flatten(2))
    torch.testing.assert_close(final, state)


def test_packed_documents(kernels: str) -> None:
    """A row of three documents is the three rows."""
    module = mixer()
    lengths = [7, 20, 13]
    documents = [torch.randn(1, n, HIDDEN, dtype=torch.float64) for n in lengths]
    seq_idx = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(lengths)).unsqueeze(0)
    packed = ours(module, torch.cat(documents, 1), seq_idx=seq_idx)
    alone = torch.cat([ours(module, document) for document in documents], 1)
    torch.testing.assert_close(packed, alone)


def test_boundaries_are_documents(kernels: str) -> None:
    """cu_seqlens says what seq_idx says, empty documents included."""
    torch.manual_seed(0)
    x, dt, A, B = torch.randn(1, 9, 2, 3), torch.rand(1, 9, 2), -torch.rand(2), torch.randn(1, 9, 1, 5)
    seq_idx = torch.tensor([[0, 0, 0, 1, 3, 3, 3, 3, 3]], dtype=torch.int32)
    expected = api.mamba_chunk_scan_combined(x, dt, A, B, B, 4, seq_idx=seq_idx)
    got = api.mamba_chunk_scan_combined(x, dt, A, B, B, 4, cu_seqlens=torch.tensor([0, 3, 4, 4, 9], dtype=torch.int32))
    torch.testing.assert_close(got, expected)


def test_bfloat16(kernels: str) -> None:
    """As in training: activations and projections in bfloat16, A, D and dt_bias in float32."""
    module = mixer()
    hidden = torch.randn(2, 45, HIDDEN, dtype=torch.float64)
    expected = module(hidden)
    module = module.bfloat16()
    for name in ("A_log", "D", "dt_bias"):
        setattr(module, name, torch.nn.Parameter(getattr(module, name).float()))
    y = ours(module, hidden.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_conv_states(kernels: str, length: int) -> None:
    """The final states of one call are the initial states of the next, also when it is shorter than the taps."""
    x, weight = torch.randn(2, 6, 12), torch.randn(6, 4)
    out = torch.empty(2, 6, 3)
    first, state = api.causal_conv1d_fn(
        x[..., :length], weight, initial_states=torch.zeros(2, 6, 3), return_final_states=True, final_states_out=out
    )
    assert state is out
    second = api.causal_conv1d_fn(x[..., length:], weight, initial_states=state)
    torch.testing.assert_close(torch.cat([first, second], -1), api.causal_conv1d_fn(x, weight))


@pytest.mark.parametrize("slots", [False, True])
def test_decode_steps_are_the_full_forward(slots: bool) -> None:
    """Token by token, the convolution and the scan give what the whole sequence gives, and leave its final state."""
    torch.manual_seed(0)
    batch, length = 3, 11
    x, B, C = (torch.randn(batch, length, *s) for s in ((HEADS, HEAD_DIM), (GROUPS, STATE), (GROUPS, STATE)))
    z, dt = torch.randn_like(x), torch.randn(batch, length, HEADS)
    A, D, dt_bias = -torch.rand(HEADS) * 3, torch.randn(HEADS), torch.randn(HEADS)
    weight, bias = torch.randn(INNER, 4), torch.randn(INNER)
    convolved = api.causal_conv1d_fn(x.flatten(2).mT, weight, bias, activation="silu").mT.unflatten(-1, (HEADS, -1))
    expected, final = api.mamba_chunk_scan_combined(
        convolved, dt, A, B, C, 4, D, z, dt_bias, dt_softplus=True, return_final_states=True
    )
    rows = torch.tensor([4, 0, 2]) if slots else None
    window = torch.zeros(5 if slots else batch, INNER, 4)
    state = torch.zeros(5 if slots else batch, HEADS, HEAD_DIM, STATE)
    per_channel = {"dt_bias": dt_bias, "D": D}
    per_channel = {name: t[:, None].expand(HEADS, HEAD_DIM) for name, t in per_channel.items()}
    for t in range(length):
        token = api.causal_conv1d_update(
            x[:, t].flatten(1), window, weight, bias, "silu", conv_state_indices=rows
        ).unflatten(-1, (HEADS, -1))
        y = api.selective_state_update(
            state,
            token,
            dt[:, t, :, None].expand(-1, -1, HEAD_DIM),
            A[:, None, None].expand(-1, HEAD_DIM, STATE),
            B[:, t],
            C[:, t],
            z=z[:, t],
            dt_softplus=True,
            state_batch_indices=rows,
            **per_channel,
        )
        torch.testing.assert_close(y, expected[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state if rows is None else state[rows], final, rtol=1e-4, atol=1e-5)
    if rows is not None:
        assert not state[[1, 3]].any()


def test_decode_several_tokens_at_once() -> None:
    x, weight = torch.randn(2, 6, 5), torch.randn(6, 4)
    window = torch.zeros(2, 6, 3)
    torch.testing.assert_close(api.causal_conv1d_update(x, window, weight), api.causal_conv1d_fn(x, weight))
    torch.testing.assert_close(window, x[..., -3:])


def test_megatron_finds_state_dtype() -> None:
    """MambaMixer asks for this parameter by inspection."""
    for function in (api.mamba_chunk_scan_combined, api.mamba_split_conv1d_scan_combined):
        assert "state_dtype" in inspect.signature(function).parameters


def test_errors() -> None:
    x, dt, A, B = torch.randn(1, 4, 2, 3), torch.rand(1, 4, 2), -torch.rand(2), torch.randn(1, 4, 1, 5)
    with pytest.raises(ConfigError, match="per document"):
        api.mamba_chunk_scan_combined(x, dt, A, B, B, 4, return_varlen_states=True)
    with pytest.raises(ConfigError, match="one row"):
        api.mamba_chunk_scan_combined(
            x, dt, A, B, B, 4, cu_seqlens=torch.tensor([0, 4]), seq_idx=torch.zeros(1, 4).int()
        )
    rest = (torch.randn(16, 4), None, torch.zeros(2), A, torch.ones(2), 4)
    with pytest.raises(ConfigError, match="headdim"):
        api.mamba_split_conv1d_scan_combined(torch.randn(1, 4, 24), *rest)
    with pytest.raises(ConfigError, match="does not split"):
        api.mamba_split_conv1d_scan_combined(torch.randn(1, 4, 25), *rest, headdim=3)
    with pytest.raises(ConfigError, match="circular"):
        api.causal_conv1d_update(
            torch.randn(1, 6), torch.zeros(1, 6, 3), torch.randn(6, 4), cache_seqlens=torch.tensor([0])
        )
