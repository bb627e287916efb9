"""Write the table of docs/performance.md from results/*.json: no figure there is typed by hand.

    python benchmarks/performance_page.py

A benchmark whose file is missing has not been run, and its row says so; what a file lacks, or has an error in place of,
was not measured, and its row says why. The text around the table is left alone.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- from benchmarks/results, by benchmarks/performance_page.py -->", "<!-- end -->"
UNKNOWN = "not measured"


WIDEST = 160  # letters of a reason
Value = Callable[[Any], str]


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: What is compared with what, ratio first.
        script: The benchmark that measures it.
        result: Its file in results, without .json.
        value: What of the file is shown.
        bar: What it should reach, if a bar was set.
    """

    what: str
    script: str
    result: str
    value: Value
    bar: str = ""


class MissingError(Exception):
    """A file does not have a figure; the message says why."""


def _at(found: Any, *path: str) -> Any:
    """What lies there in a result.

    Raises:
        MissingError: Nothing, or an error in its place.
    """
    for key in path:
        if not isinstance(found, dict) or key not in found:
            why = found.get("missing", {}) if isinstance(found, dict) else {}
            raise MissingError(_error(found) or (why.get(key) if isinstance(why, dict) else "") or f"no {key}")
        found = found[key]
    if why := _error(found):
        raise MissingError(why)
    if found is None:
        raise MissingError(f"no {path[-1]}")
    return found


def _error(found: Any) -> str:
    return str(found["error"]) if isinstance(found, dict) and "error" in found else ""


def _over(case: str) -> Value:
    return lambda found: f"{_at(found, 'cases', case, 'ours_over_this'):.2f}x"


def _memory(found: Any) -> str:
    ours, theirs = (_at(found, "cases", name, "peak_mb") for name in ("megatron_ext", "transformers, chunk 256"))
    return f"{ours / theirs:.2f}x"


def _ssm_gpu(size: str) -> Value:
    def value(found: Any) -> str:
        given = _at(found, "sizes", size)
        cases = {"missing": given.get("missing", {}), **_at(given, "cases")}
        theirs, ours = (_at(cases, name, "step_seconds") for name in ("mamba_ssm", "triton"))
        return f"{theirs / ours:.2f}x"

    return value


def _ssm_gpu_errors(found: Any) -> str:
    given = _at(found, "sizes", "full")
    cases = {"missing": given.get("missing", {}), **_at(given, "cases")}
    theirs, ours = (_at(cases, name, "errors") for name in ("mamba_ssm", "triton"))
    return f"at most {max(ours[name] / theirs[name] for name in ours):.2f}x of theirs"


def _decode(base: str) -> Value:
    def value(found: Any) -> str:
        ours, theirs = (_at(found, "models", name) for name in ("hybrid", base))
        shared = sorted((key for key in set(ours) & set(theirs) if key.isdigit()), key=int)
        if not shared:
            missing = found.get("missing", {})
            why = [missing[name] for name in ("hybrid", base) if name in missing]
            raise MissingError(why[0] if why else "no context that both were measured at")
        longest = shared[-1]

        def ratio(key: str) -> float:
            return _at(ours, longest, key) / _at(theirs, longest, key)

        measured, roofline = ratio("tokens_per_second"), ratio("roofline_tokens_per_second")
        return f"{measured:.1f}x at {int(longest):,} tokens (bytes allow {roofline:.1f}x)"

    return value


def _kd(key: str, base: str = "plain") -> Value:
    """Ours is what the programs run; where it is said what compares the logits there, it is shown."""

    def value(found: Any) -> str:
        ours, theirs = (_at(found, "cases", name, key) for name in ("ours", base))
        by = f" (`{found['compare']}`)" if found.get("compare") and found.get("device") != "CPU" else ""
        return f"{ours / theirs:.2f}x{by}"

    return value


def _kd_errors(found: Any) -> str:
    ours, theirs = (_at(found, "cases", name, "errors") for name in ("ours", "plain"))
    return f"at most {max(ours[key] / theirs[key] for key in ours):.2f}x ({max(ours.values()):.1e})"


def _range(key: str) -> Value:
    def value(found: Any) -> str:
        ratios = [_at(entry, key) for entry in _at(found, "results")]
        return f"{min(ratios):.2f}x to {max(ratios):.2f}x"

    return value


def _pretrain(model: str) -> Value:
    def value(found: Any) -> str:
        own = _at(found, "models", model)
        if own.get("ratio") is None:
            raise MissingError(own.get("peer_missing") or _error(own.get("peer")) or "no ratio")
        return f"{own['ratio']:.2f}x"

    return value


def _mfu(model: str) -> Value:
    def value(found: Any) -> str:
        own = _at(found, "models", model, "ours")
        return f"{_at(own, 'mfu'):.1%} ({_at(own, 'tokens_per_second'):,.0f} tokens/s)"

    return value


def _estimated(found: Any) -> str:
    ratios = _at(found, "ratios")
    failed = [name for name, case in found.get("cases", {}).items() if _error(case)]
    if not ratios:
        raise MissingError(_error(found["cases"][failed[0]]) if failed else "no case")
    more = f" (failed: {'; '.join(failed)})" if failed else ""
    return f"{min(ratios.values()):.2f}x to {max(ratios.values()):.2f}x{more}"


def _images(peer: str, what: str = "inference", of: str = "models") -> Value:
    def value(found: Any) -> str:
        ratios = _at(found, of, what, "ratio")
        if peer not in ratios:
            raise MissingError(found.get("mamba_ssm_missing") or "no such peer")
        return f"{ratios[peer]:.2f}x"

    return value


def _real(case: str, what: str = "passes") -> Value:
    def value(found: Any) -> str:
        own = _at(found, "cases", case, what)
        return f"{own['ratio']:.2f}x ({own['slowest_pair']:.2f}x to {own['fastest_pair']:.2f}x)"

    return value


def _halved(found: Any) -> str:
    full, half = (_at(found, "cases", f"{name}-512", "passes", "ours") for name in ("fp32", "bf16"))
    return f"{full / half:.2f}x"


def _left_out(precision: str) -> Value:
    return lambda found: f"{_at(found, 'cases', precision, 'ratio'):.2f}x"


def _ratio(found: Any) -> str:
    return f"{_at(found, 'ratio'):.2f}x"


ROWS = [
    Row("device copy on a GPU, bytes read and written", "gpu.py", "gpu_ceilings",
        lambda found: f"{_at(found, 'copy_bytes_per_second') / 1e12:.2f} TB/s"),
    Row("matrix product in bf16 on a GPU", "gpu.py", "gpu_ceilings",
        lambda found: f"{_at(found, 'matmul_flops') / 1e12:,.0f} TFLOP/s"),
    *(row for norm, result in (("", "ssm_gpu"), (" with its norm", "ssm_gpu_norm")) for row in (
        Row(f"Mamba-2 mixer{norm} on a GPU: speed over mamba-ssm, forward + backward", "ssm_gpu.py", result,
            _ssm_gpu("full"), "" if norm else "1.3x"),
        Row("the same, a rank's share at tensor parallel 8", "ssm_gpu.py", result, _ssm_gpu("tp8")),
        Row("the same, a rank's share of a context of 128K", "ssm_gpu.py", result, _ssm_gpu("context")),
        Row("the same: error of each gradient over mamba-ssm's", "ssm_gpu.py", result, _ssm_gpu_errors, "1x"),
    )),
    *(row for result in ("ssm_cpu", "ssm_cpu_xeon") for row in (
        Row("Mamba-2 mixer on a CPU: speed over transformers at its default chunk", "ssm_cpu.py", result,
            _over("transformers, chunk 256"), "5x"),
        Row("the same at transformers' best chunk", "ssm_cpu.py", result, _over("transformers, chunk 64"), "2x"),
        Row("the same: peak memory over transformers'", "ssm_cpu.py", result, _memory, "at most 0.33x"),
    )),
    Row("decoding on a GPU: hybrid over a Transformer with full heads", "decode.py", "decode_cuda",
        _decode("Transformer, full heads")),
    Row("decoding on a GPU: hybrid over a Transformer with grouped heads", "decode.py", "decode_cuda",
        _decode("Transformer, grouped")),
    Row("decoding on a CPU: hybrid over a Transformer with full heads", "decode.py", "decode_cpu",
        _decode("Transformer, full heads")),
    Row("decoding on a CPU: hybrid over a Transformer with grouped heads", "decode.py", "decode_cpu",
        _decode("Transformer, grouped")),
    *(Row(f"pre-training a {model} model on a GPU: speed over plain Megatron-Core", "pretrain.py", "pretrain_cuda",
          _pretrain(model), "1x") for model in ("Transformer", "Mamba-2", "hybrid")),
    *(Row(f"pre-training a {model} model on a GPU: share of 989 TFLOP/s", "pretrain.py", "pretrain_cuda", _mfu(model))
      for model in ("Transformer", "Mamba-2", "hybrid")),
    *(Row(f"pre-training a {model} model on a CPU: speed over plain Megatron-Core", "pretrain.py", "pretrain_cpu",
          _pretrain(model), "1x") for model in ("Transformer", "Mamba-2", "hybrid")),
    *(Row(f"a 135M Llama model on a CPU in {name}: speed over transformers, forward + backward", "real_model_cpu.py",
          "real_model_cpu", _real(f"{name}-512"), "1.2x") for name in ("fp32", "bf16")),
    Row("the same in fp32, a sequence of 1,024", "real_model_cpu.py", "real_model_cpu", _real("fp32-1024"), "1.2x"),
    Row("the same: bf16 over fp32, both ours", "real_model_cpu.py", "real_model_cpu", _halved),
    *(Row(f"leaving out each of 30 sub-layers on a CPU in {name}: time over the floor", "leave_one_out.py",
          "leave_one_out_cpu", _left_out(name), "at most 1.3x") for name in ("fp32", "bf16")),
    Row("estimated memory over the measured peak on a GPU", "memory.py", "memory_cuda", _estimated, "0.9x to 1.1x"),
    Row("estimated memory over the measured peak on a CPU", "memory.py", "memory_cpu", _estimated, "0.9x to 1.1x"),
    Row("estimated time of a step, median error on a CPU", "scaling.py", "scaling",
        lambda found: f"{_at(found, 'median_error'):.0%} (largest {_at(found, 'largest_error'):.0%})"),
    Row("distillation loss on a GPU: time over the plain method", "kd_loss.py", "kd_loss_cuda", _kd("seconds")),
    Row("the same: peak memory", "kd_loss.py", "kd_loss_cuda", _kd("peak_bytes")),
    Row("the same: errors of the gradients, those of the plain method in bf16 as 1", "kd_loss.py", "kd_loss_cuda",
        _kd_errors),
    Row("the same: time over Liger-Kernel's", "kd_loss.py", "kd_loss_cuda", _kd("seconds", "liger")),
    Row("the same: peak memory over Liger-Kernel's", "kd_loss.py", "kd_loss_cuda", _kd("peak_bytes", "liger")),
    Row("distillation loss on a CPU: time over the plain method", "kd_loss.py", "kd_loss_cpu", _kd("seconds")),
    Row("the same: peak memory", "kd_loss.py", "kd_loss_cpu", _kd("peak_bytes")),
    Row("distilling in a pipeline: a step over the student's and the teacher's forward", "distillation_pipeline.py",
        "distillation_pipeline", _ratio),
    Row("calibration pass on a GPU: time over a plain forward pass", "calibration.py", "calibration_cuda", _ratio),
    Row("calibration pass on a CPU: time over a plain forward pass", "calibration.py", "calibration", _ratio),
    Row("applying a plan: time over `cp` of the bytes it reads", "apply.py", "apply", _range("ratio")),
    *(row for device, result in (("CPU", "vision_speed_cpu"), ("GPU", "vision_speed_cuda")) for row in (
        Row(f"images per second on a {device}: mambavision_tiny over timm's swin_tiny", "vision_speed.py", result,
            _images("swin_tiny_patch4_window7_224")),
        Row("the same over convnext_tiny", "vision_speed.py", result, _images("convnext_tiny")),
        Row("the same: forward with backward, over swin_tiny", "vision_speed.py", result,
            _images("swin_tiny_patch4_window7_224", "training")),
        Row(f"selective scan on a {device}, forward + backward: speed over the recurrence", "vision_speed.py", result,
            _images("recurrence", "training", "scan")),
    )),
    Row("selective scan on a GPU, forward + backward: speed over mamba-ssm", "vision_speed.py", "vision_speed_cuda",
        _images("mamba_ssm", "training", "scan")),
    Row("converting a checkpoint: time over `cp`", "convert.py", "convert", _range("ratio")),
]  # fmt: skip


def table(results: Path = HERE / "results") -> str:
    """The table, from the files of this folder."""
    lines = ["| figure | measured | bar | where and when | benchmark |", "|---|---|---|---|---|"]
    for row in ROWS:
        value, where = shown(row, results / f"{row.result}.json")
        lines.append(f"| {row.what} | {value} | {row.bar} | {where} | `{row.script}` |")
    return "\n".join(lines)


def shown(row: Row, path: Path) -> tuple[str, str]:
    """What the file says of a figure, or why it says nothing, and where and when it was measured."""
    if not path.exists():
        return UNKNOWN, ""
    found: Any = {}
    try:
        found = json.loads(path.read_text())
        value = row.value(found)
    except (MissingError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        why = str(error) if isinstance(error, MissingError) else f"{path.name} cannot be read: {error}"
        value = f"{UNKNOWN}: {_short(why)}"
    if not isinstance(found, dict):
        return value, ""
    device = found.get("device", "CPU")
    where = [
        device if device not in ("CPU", "cpu") else found.get("machine", ""),
        found.get("date", ""),
        found.get("remark", ""),
    ]
    return value, ", ".join(part for part in where if part)


def _short(why: str) -> str:
    """On one line of a table."""
    line = " ".join(why.replace("|", "/").split())
    return line if len(line) <= WIDEST else line[: WIDEST - 3] + "..."


def page(text: str, generated: str) -> str:
    """The page with this table in the place of its own."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{generated}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), table()))
    print(table())
