"""The faster kernels are taken, and the choice is made once; stand-ins take the time that a fake clock says."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext import platform
from megatron_ext.families.language_model import LANGUAGE_MODEL
from megatron_ext.models import bootstrap
from megatron_ext.ops import autotune, dispatch, mamba_ssm_api
from megatron_ext.ops.autotune import REPEATS, WARM_UP, Shape, choose
from megatron_ext.ops.gated_norm import naive as norm_naive
from megatron_ext.ops.gated_norm import triton as triton_norm
from megatron_ext.ops.mamba_mixer import naive
from megatron_ext.ops.mamba_mixer import triton as triton_mixer
from megatron_ext.options.early_flags import read_early
from megatron_ext.platform import state_space


class Clock:
    """Stand-ins that move it forward when they run."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.seconds, self.runs = 0.0, seconds, []

    def __call__(self) -> float:
        return self.now

    def candidates(self, shape: Shape) -> dict[str, Callable[[], None]]:
        def run(name: str) -> None:
            first = self.runs.count(name) == 0
            self.runs.append(name)
            self.now += 100 if first else self.seconds[name]  # compiling

        return {name: lambda name=name: run(name) for name in self.seconds}


def chosen(clock: Clock, path: Path, shape: Shape | None = None, machine: str = "a GPU") -> str:
    return choose(shape or Shape(), clock.candidates, clock, path / "choices.json", machine)


@pytest.mark.parametrize(("ours", "expected"), [(1.0, "triton"), (3.0, "mamba_ssm")])
def test_the_faster_is_chosen_whatever_compiling_takes(tmp_path: Path, ours: float, expected: str) -> None:
    assert chosen(Clock(triton=ours, mamba_ssm=2.0), tmp_path) == expected


def test_a_choice_holds_for_later_runs_of_the_same_shape_and_machine(tmp_path: Path) -> None:
    assert chosen(Clock(triton=1.0, mamba_ssm=2.0), tmp_path) == "triton"
    later = Clock(triton=3.0, mamba_ssm=2.0)
    assert chosen(later, tmp_path) == "triton"
    assert later.runs == []
    assert chosen(later, tmp_path, Shape(heads=16)) == "mamba_ssm"
    assert len(later.runs) == 2 * (WARM_UP + REPEATS)
    assert chosen(later, tmp_path, machine="another") == "mamba_ssm"


def test_kernels_that_have_changed_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssd").mkdir()
    source = tmp_path / "ssd" / "triton.py"
    monkeypatch.setattr(autotune, "__file__", str(tmp_path / "autotune.py"))
    versions = set()
    for text in ("a = 1", "a = 2"):
        source.write_text(text)
        versions.add(autotune.kernel_version())
    assert len(versions) == 2


def test_the_first_of_two_processes_decides(tmp_path: Path) -> None:
    """Another rank has written its choice while this one measured."""

    class Slower(Clock):
        def candidates(self, shape: Shape) -> dict[str, Callable[[], None]]:
            chosen(Clock(triton=1.0, mamba_ssm=2.0), tmp_path)
            return super().candidates(shape)

    assert chosen(Slower(triton=3.0, mamba_ssm=2.0), tmp_path) == "triton"


def test_a_damaged_memory_is_measured_anew(tmp_path: Path) -> None:
    (tmp_path / "choices.json").write_text("{")
    assert chosen(Clock(triton=1.0, mamba_ssm=2.0), tmp_path) == "triton"
    assert len(json.loads((tmp_path / "choices.json").read_text())) == 1


def test_a_candidate_that_cannot_run_drops_out(tmp_path: Path) -> None:
    def fails() -> None:
        raise RuntimeError("no such tile")

    clock = Clock(mamba_ssm=2.0)
    made = choose(Shape(), lambda shape: {"triton": fails, **clock.candidates(shape)}, clock, tmp_path / "c", "a GPU")
    assert made == "mamba_ssm"
    with pytest.raises(RuntimeError, match="no such tile"):
        choose(Shape(heads=1), lambda shape: {"triton": fails}, clock, tmp_path / "c", "a GPU")


def test_other_processes_of_a_node_wait_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        monkeypatch.setenv("LOCAL_RANK", "0")
        chosen(Clock(triton=1.0, mamba_ssm=2.0), tmp_path)

    monkeypatch.setattr(autotune.time, "sleep", sleep)
    assert chosen(Clock(triton=3.0, mamba_ssm=2.0), tmp_path) == "triton"
    assert len(waited) == 1


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert chosen(Clock(triton=1.0, mamba_ssm=2.0), tmp_path / "file") == "triton"


@pytest.mark.parametrize(
    ("changes", "shape", "expected"),
    [
        ({}, Shape(), True),
        ({"device_type": "cpu"}, Shape(), False),
        ({"available": False}, Shape(), False),
        ({"triton_runs": False}, Shape(), False),
        ({}, Shape(head_dim=256), False),
    ],
)
def test_only_where_both_can_run(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], shape: Shape, expected: bool
) -> None:
    answers = {"device_type": "cuda", "available": True, "triton_runs": True} | changes
    for module, name in ((platform, "device_type"), (state_space, "available"), (dispatch, "triton_runs")):
        monkeypatch.setattr(module, name, lambda answer=answers[name]: answer)
    assert bootstrap._has_choice(shape) == expected


def layer_shape(words: list[str]) -> Shape | None:
    return LANGUAGE_MODEL.ssm_shape(read_early(words, {}, LANGUAGE_MODEL.early_arguments()))


def test_the_shape_is_what_a_rank_runs() -> None:
    flags = ["--hybrid-layer-pattern=M-*-", "--mamba-num-heads", "64", "--mamba-num-groups", "4"]
    split = ["--tensor-model-parallel-size", "2", "--seq-length", "1024", "--bf16"]
    assert layer_shape([*flags, *split]) == Shape(32, 64, 128, 2, 1024, "bfloat16")
    assert layer_shape([*flags, *split, "--micro-batch-size", "4"]) == Shape(32, 64, 128, 2, 1024, "bfloat16", 4)
    long = ["--hybrid-layer-pattern=M", "--seq-length", "131072"]
    shared = ["--tensor-model-parallel-size", "4", "--context-parallel-size", "8"]
    assert layer_shape([*long, *shared]) == Shape(4, 64, 128, 1, 131_072, "float32", norm_apart=True)
    assert layer_shape(long) == Shape(tokens=16_384, dtype="float32"), "no more than a measurement should take"
    several = layer_shape([*long, *shared, "--micro-batch-size", "8"])
    assert several == Shape(4, 64, 128, 1, 131_072, "float32", 4, norm_apart=True)
    assert layer_shape(["--hybrid-layer-pattern=*-"]) is None


@pytest.mark.parametrize("apart", [False, True])
def test_candidates_run_what_megatron_runs(monkeypatch: pytest.MonkeyPatch, apart: bool) -> None:
    """On stand-ins in plain torch: what arrives is laid out as Megatron's mixer lays it out."""
    arrived: list[tuple[str, tuple[int, ...], bool, bool]] = []

    def mixer(zxbcdt: torch.Tensor, *rest: Any, norm_weight: Any = None, **options: Any) -> Any:
        arrived.append(("triton", tuple(zxbcdt.shape), zxbcdt.is_contiguous(), norm_weight is not None))
        return naive.conv_scan_norm(zxbcdt, *rest, norm_weight=norm_weight, **options)

    def combined(zxbcdt: torch.Tensor, *rest: Any, **options: Any) -> Any:
        arrived.append(("mamba_ssm", tuple(zxbcdt.shape), zxbcdt.is_contiguous(), "rmsnorm_weight" in options))
        return mamba_ssm_api.mamba_split_conv1d_scan_combined(zxbcdt, *rest, **options)

    monkeypatch.setattr(triton_mixer, "conv_scan_norm", mixer)
    monkeypatch.setattr(triton_norm, "gated_rms_norm", norm_naive.gated_rms_norm)
    names = {"ssd_combined": {"mamba_split_conv1d_scan_combined": combined}}
    for name, content in (names | {"layernorm_gated": {"RMSNorm": mamba_ssm_api.RMSNorm}}).items():
        module = f"mamba_ssm.ops.triton.{name}"
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**content))  # type: ignore[arg-type]
    shape = Shape(4, 8, 16, 2, 24, "float32", 2, norm_apart=apart)
    for run in autotune._on_this_gpu(shape, "cpu").values():
        run()
    size = (2, 24, 2 * 32 + 2 * 2 * 16 + 4)
    assert arrived == [("triton", size, apart, not apart), ("mamba_ssm", size, True, False)]
