"""`pretrain_hybrid.py` with a wait: at a step (`WAIT_AT=2`), or while the data sets are built (`WAIT_AT=data`).

WAIT_SECONDS says how long; a file `waiting.RANK` appears when it begins. Under `ELSEWHERE=1` rank 1 finds no data.
"""

import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ext.cli import main
from megatron_ext.training import run_job

if os.environ.get("ELSEWHERE") == os.environ.get("RANK", "0"):
    os.chdir("/")
parse_command_line = run_job.parse_command_line
waits_at = os.environ["WAIT_AT"]


def wait() -> None:
    Path(f"waiting.{os.environ['RANK']}").touch()
    time.sleep(float(os.environ["WAIT_SECONDS"]))


def parse_and_wait_later(*inputs: Any) -> Any:
    """Once the platform is prepared, Megatron may be imported."""
    parsed = parse_command_line(*inputs)
    from megatron_ext.data import batch
    from megatron_ext.training import step

    language_modelling, build = step.language_modelling, batch.build
    calls = 0

    def waiting_task(*inputs: Any) -> Any:
        task = language_modelling(*inputs)
        return replace(task, forward_step=partial(waiting_step, task.forward_step))

    def waiting_step(forward_step: Any, *inputs: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if str(calls) == waits_at:
            wait()
        return forward_step(*inputs, **options)

    def waiting_build(*inputs: Any) -> Any:
        if waits_at == "data":
            wait()
        return build(*inputs)

    step.language_modelling, batch.build = waiting_task, waiting_build
    return parsed


run_job.parse_command_line = parse_and_wait_later
sys.exit(main(["pretrain", *sys.argv[1:]]))
