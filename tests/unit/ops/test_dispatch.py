"""Choosing a backend: what is there is found, what is not is named."""

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.ops import dispatch, mamba_ssm_api


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    dispatch.set_backend("auto")


def test_auto_follows_set_backend() -> None:
    assert dispatch.backend().name == "torch"
    assert dispatch.set_backend("naive") is dispatch.backend("auto") is dispatch.backend("naive")
    dispatch.set_backend("auto")
    assert dispatch.backend().name == "torch"


def test_the_functions_follow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """set_backend decides what the mamba_ssm functions run."""
    calls = []
    torch_backend = dispatch.backend("torch")

    def spied(name: str) -> Callable:
        def call(*arguments: object) -> object:
            calls.append(name)
            return getattr(torch_backend, name)(*arguments)

        return call

    names = ("ssd", "causal_conv1d", "gated_rms_norm", "conv_scan_norm", "conv_step", "state_step")
    spy = dispatch.Backend("spy", *(spied(name) for name in (*names, "selective_scan")))
    monkeypatch.setitem(dispatch._TORCH_BACKENDS, "spy", spy)
    dispatch.set_backend("spy")
    x = torch.randn(1, 4, 2, 3)
    mamba_ssm_api.mamba_chunk_scan_combined(x, x[..., 0].exp(), -torch.ones(2), x[:, :, :1], x[:, :, 1:], 4)
    mamba_ssm_api.causal_conv1d_fn(torch.randn(1, 3, 4), torch.randn(3, 4))
    mamba_ssm_api.RMSNorm(3)(x)
    weights = torch.randn(3 + 2, 4), None, torch.zeros(1), -torch.ones(1), torch.ones(1)
    mamba_ssm_api.mamba_split_conv1d_scan_combined(torch.randn(1, 4, 3 + 5 + 1), *weights, 4, headdim=3)
    mamba_ssm_api.causal_conv1d_update(torch.randn(1, 3), torch.zeros(1, 3, 3), torch.randn(3, 4))
    token, rate, B = torch.randn(1, 2, 3), -torch.ones(2, 3, 5), torch.randn(1, 1, 5)
    mamba_ssm_api.selective_state_update(torch.zeros(1, 2, 3, 5), token, token.exp(), rate, B, B)
    assert calls == list(names)


def test_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        dispatch.set_backend("naive")
        dispatch.set_backend("naive")
        dispatch.backend()
    assert [record.getMessage() for record in caplog.records] == ["state-space kernels: naive"]
    caplog.clear()
    dispatch.set_backend("auto")
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(2):
            dispatch.backend(x=torch.zeros(1))
    assert [record.getMessage() for record in caplog.records] == [
        "state-space kernels: torch (chosen for cpu, float32)"
    ]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "triton"),
        ({"device": "cpu"}, "torch"),
        ({"dtype": torch.float64}, "torch"),
        ({"channels": 256}, "torch"),
        ({"state": 512}, "torch"),
        ({"channels": 128, "state": 256}, "torch"),
        ({"taps": 5}, "torch"),
    ],
)
def test_auto_looks_at_device_dtype_and_shape(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], name: str
) -> None:
    case = {"device": "cuda", "dtype": torch.bfloat16, "channels": 64, "state": 128, "taps": 4} | change
    x = SimpleNamespace(device=torch.device(case.pop("device")), dtype=case.pop("dtype"))
    monkeypatch.setattr(dispatch, "triton_runs", lambda: True)
    monkeypatch.setattr(dispatch, "device_type", lambda: "cuda")
    assert dispatch.backend(x=x, **case).name == name  # type: ignore[arg-type]


def test_triton_wants_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_ext.ops import triton_jit

    monkeypatch.setattr(dispatch, "device_type", lambda: "cpu")
    monkeypatch.setattr(triton_jit, "INTERPRETED", False)
    with pytest.raises(ConfigError, match="need a CUDA device"):
        dispatch.set_backend("triton")
    monkeypatch.setattr(triton_jit, "INTERPRETED", True)
    assert dispatch.set_backend("triton") is dispatch.backend()


def test_deterministic_algorithms_take_the_first_configuration() -> None:
    """Which one is the fastest is measured, and so may differ from process to process."""
    from megatron_ext.ops import triton_jit

    choices: Any = ["first", "second"]
    assert triton_jit.PRUNE["early_config_prune"](choices, {}, CHUNK=64) == choices
    torch.use_deterministic_algorithms(True)
    try:
        assert triton_jit.PRUNE["early_config_prune"](choices, {}, CHUNK=64) == ["first"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_missing_backends_say_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="mamba_ssm"):
        dispatch.set_backend("mamba_ssm")
    with pytest.raises(ConfigError, match="did you mean 'torch'"):
        dispatch.set_backend("torhc")
    assert dispatch.backend().name == "torch"


def test_an_installed_stand_in_is_not_mistaken_for_mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The platform puts our functions under mamba_ssm's name; that is not mamba_ssm."""
    import sys
    import types

    for name in ("mamba_ssm", "causal_conv1d"):
        if dispatch.PathFinder.find_spec(name) is not None:
            pytest.skip(f"{name} is installed")
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ConfigError, match="mamba_ssm not installed, causal_conv1d not installed"):
        dispatch.backend("mamba_ssm")
