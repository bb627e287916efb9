"""`pretrain_hybrid.py` with a wait: at a step (`WAIT_AT=2`), or while the data sets are built (`WAIT_AT=data`).

WAIT_SECONDS says how long; a file `waiting.RANK` appears when it begins. Under `ELSEWHERE=1` rank 1 finds no data.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pretrain_hybrid
from megatron_ext.training.program import main

if os.environ.get("ELSEWHERE") == os.environ.get("RANK", "0"):
    os.chdir("/")
launch = pretrain_hybrid.launch
waits_at = os.environ["WAIT_AT"]


def wait() -> None:
    Path(f"waiting.{os.environ['RANK']}").touch()
    time.sleep(float(os.environ["WAIT_SECONDS"]))


def launch_and_wait_later(job: Any) -> Any:
    """Once the platform is prepared, Megatron may be imported."""
    launched = launch(job)
    from megatron_ext.training import data, step

    forward_step, build = step.forward_step, data.build
    calls = 0

    def waiting_step(*inputs: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if str(calls) == waits_at:
            wait()
        return forward_step(*inputs, **options)

    def waiting_build(*inputs: Any) -> Any:
        if waits_at == "data":
            wait()
        return build(*inputs)

    step.forward_step, data.build = waiting_step, waiting_build
    return launched


pretrain_hybrid.launch = launch_and_wait_later
sys.exit(main(pretrain_hybrid.run))
