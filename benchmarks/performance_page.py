"""Write the table of docs/performance.md from results/*.json: no figure there is typed by hand.

    python benchmarks/performance_page.py

A benchmark whose file is missing has not been run, and its row says so. The text around the table is left alone.
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
    value: Callable[[dict[str, Any]], str]
    bar: str = ""


def _over(case: str) -> Callable[[dict[str, Any]], str]:
    return lambda found: f"{found['cases'][case]['ours_over_this']:.2f}x"


def _memory(found: dict[str, Any]) -> str:
    cases = found["cases"]
    return f"{cases['megatron_ext']['peak_mb'] / cases['transformers, chunk 256']['peak_mb']:.2f}x"


def _ssm_gpu(found: dict[str, Any]) -> str:
    cases = found["cases"]
    if "mamba_ssm" not in cases or "triton" not in cases:
        return UNKNOWN
    return f"{cases['mamba_ssm']['step_seconds'] / cases['triton']['step_seconds']:.2f}x"


def _ssm_gpu_errors(found: dict[str, Any]) -> str:
    cases = found["cases"]
    if "mamba_ssm" not in cases or "triton" not in cases:
        return UNKNOWN
    ours, theirs = cases["triton"]["errors"], cases["mamba_ssm"]["errors"]
    return f"at most {max(ours[name] / theirs[name] for name in ours):.2f}x of theirs"


def _decode(base: str) -> Callable[[dict[str, Any]], str]:
    def value(found: dict[str, Any]) -> str:
        ours, theirs = found["models"]["hybrid"], found["models"][base]
        shared = sorted(set(ours) & set(theirs), key=int)
        if not shared:
            return UNKNOWN
        longest = shared[-1]

        def ratio(key: str) -> float:
            return ours[longest][key] / theirs[longest][key]

        measured, roofline = ratio("tokens_per_second"), ratio("roofline_tokens_per_second")
        return f"{measured:.1f}x at {int(longest):,} tokens (bytes allow {roofline:.1f}x)"

    return value


def _kd(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda found: f"{found['cases']['ours'][key] / found['cases']['plain'][key]:.2f}x"


def _range(key: str) -> Callable[[dict[str, Any]], str]:
    def value(found: dict[str, Any]) -> str:
        ratios = [entry[key] for entry in found["results"]]
        return f"{min(ratios):.2f}x to {max(ratios):.2f}x"

    return value


def _pretrain(model: str) -> Callable[[dict[str, Any]], str]:
    def value(found: dict[str, Any]) -> str:
        own = found["models"][model]
        return f"{own['ratio']:.2f}x" if "ratio" in own else f"{UNKNOWN}: {own['peer_missing']}"

    return value


def _estimated(found: dict[str, Any]) -> str:
    return f"{min(found['ratios'].values()):.2f}x to {max(found['ratios'].values()):.2f}x"


ROWS = [
    Row("Mamba-2 mixer on a GPU: speed over mamba-ssm, forward + backward", "ssm_gpu.py", "ssm_gpu", _ssm_gpu, "1.3x"),
    Row("the same: error of each gradient over mamba-ssm's", "ssm_gpu.py", "ssm_gpu", _ssm_gpu_errors, "1x"),
    Row("the same with its norm: speed over mamba-ssm", "ssm_gpu.py --norm", "ssm_gpu_norm", _ssm_gpu),
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
    *(Row(f"pre-training a {model} model on a CPU: speed over plain Megatron-Core", "pretrain.py", "pretrain_cpu",
          _pretrain(model), "1x") for model in ("Transformer", "Mamba-2", "hybrid")),
    Row("estimated memory over the measured peak on a GPU", "memory.py", "memory_cuda", _estimated, "0.9x to 1.1x"),
    Row("estimated memory over the measured peak on a CPU", "memory.py", "memory_cpu", _estimated, "0.9x to 1.1x"),
    Row("estimated time of a step, median error on a CPU", "scaling.py", "scaling",
        lambda found: f"{found['median_error']:.0%} (largest {found['largest_error']:.0%})"),
    Row("distillation loss on a GPU: time over the plain method", "kd_loss.py", "kd_loss_cuda", _kd("seconds")),
    Row("the same: peak memory", "kd_loss.py", "kd_loss_cuda", _kd("peak_bytes")),
    Row("distillation loss on a CPU: time over the plain method", "kd_loss.py", "kd_loss_cpu", _kd("seconds")),
    Row("the same: peak memory", "kd_loss.py", "kd_loss_cpu", _kd("peak_bytes")),
    Row("distilling in a pipeline: a step over the student's and the teacher's forward", "distillation_pipeline.py",
        "distillation_pipeline", lambda found: f"{found['ratio']:.2f}x"),
    Row("calibration pass: time over a plain forward pass", "calibration.py", "calibration",
        lambda found: f"{found['ratio']:.2f}x"),
    Row("applying a plan: time over `cp` of the bytes it reads", "apply.py", "apply", _range("ratio")),
    Row("converting a checkpoint: time over `cp`", "convert.py", "convert", _range("ratio")),
]  # fmt: skip


def table(results: Path = HERE / "results") -> str:
    """The table, from the files of this folder."""
    lines = ["| figure | measured | bar | where and when | benchmark |", "|---|---|---|---|---|"]
    for row in ROWS:
        path = results / f"{row.result}.json"
        value, where = UNKNOWN, ""
        if path.exists():
            found = json.loads(path.read_text())
            value = row.value(found)
            device = found.get("device", "CPU")
            where = ", ".join([device if device not in ("CPU", "cpu") else found["machine"], found.get("date", "")])
        lines.append(f"| {row.what} | {value} | {row.bar} | {where.rstrip(', ')} | `{row.script}` |")
    return "\n".join(lines)


def page(text: str, generated: str) -> str:
    """The page with this table in the place of its own."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{generated}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), table()))
    print(table())
