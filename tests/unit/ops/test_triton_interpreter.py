"""The tests marked `triton`, by Triton's interpreter: it has to be asked for before anything imports Triton."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_the_kernels_agree_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "triton and not gpu"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    here = Path(__file__).parent
    done = subprocess.run([*command, here], cwd=here.parents[2], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 20
