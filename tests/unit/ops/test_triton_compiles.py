"""What the interpreter cannot say: that the kernels compile for the GPU they are made for, and fit it."""

import json
import os
import subprocess
import sys
from pathlib import Path

SHARED_MEMORY = 227 * 1024  # of an H100 or H200, per program
PRODUCTS = {"states_kernel", "scan_kernel", "states_backward_kernel", "scan_backward_kernel"}


def test_kernels_compile_for_hopper() -> None:
    """Types, shared memory and registers of every kernel at the benchmark's sizes; no GPU is needed to compile."""
    script = Path(__file__).parents[2] / "support" / "hopper_compile.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = {found["kernel"]: found for found in json.loads(done.stdout)}
    others = {"conv_kernel", "conv_backward_kernel", "decay_kernel", "decay_backward_kernel"}
    others |= {"norm_kernel", "norm_backward_kernel", "conv_step_kernel", "state_step_kernel"}
    assert kernels.keys() == PRODUCTS | others
    for name, found in kernels.items():
        assert found["shared_bytes"] <= SHARED_MEMORY, found
        assert (found["matrix_instructions"] > 0) == (name in PRODUCTS), found
        # The fused backward trades some spilling, to L1, for twice the tokens in a chunk; nothing else may spill.
        assert found["spilled_bytes"] <= (768 if name == "scan_backward_kernel" else 64), found
