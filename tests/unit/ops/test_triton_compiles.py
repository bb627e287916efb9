"""What the interpreter cannot say: that the kernels compile for the GPU they are made for, and fit it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_ext.ops.triton_tiles import MIN_SHARED_MEMORY

PRODUCTS = {"states_kernel", "scan_kernel", "states_backward_kernel", "scan_backward_kernel"}


def compiled(*options: str) -> list[dict[str, Any]]:
    """What `hopper_compile.py` says of each kernel."""
    script = Path(__file__).parents[2] / "support" / "hopper_compile.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_kernels_compile_for_hopper() -> None:
    """Types, shared memory and registers of every kernel at the benchmark's sizes; no GPU is needed to compile."""
    kernels = {found["kernel"]: found for found in compiled()}
    others = {"conv_kernel", "conv_backward_kernel", "decay_kernel", "decay_backward_kernel"}
    others |= {"norm_kernel", "norm_backward_kernel", "conv_step_kernel", "state_step_kernel"}
    others |= {"forward_kernel", "backward_kernel"}  # of the selective scan
    assert kernels.keys() == PRODUCTS | others
    for name, found in kernels.items():
        assert found["shared_bytes"] <= MIN_SHARED_MEMORY, found
        assert (found["matrix_instructions"] > 0) == (name in PRODUCTS), found
        # ptxas before 13.3 overwrites registers that a Hopper matrix unit has not read yet, and Triton has been wrong
        # about operands that it transposes on their way to shared memory.
        assert found["operands_in_registers"] == found["copied_transposes"] == 0, found
        # The fused backward trades some spilling, to L1, for twice the tokens in a chunk; nothing else may spill.
        assert found["spilled_bytes"] <= (384 if name == "scan_backward_kernel" else 64), found
    # The token, three inputs, three gradients and five sums go from one token to the next. Where two of the gradients
    # began as one value, Triton dropped them, and half of dx, which the interpreter knows nothing of.
    assert kernels["conv_backward_kernel"]["carried"] == 12
    assert kernels["conv_kernel"]["carried"] == 4


def test_the_first_configurations_fit_at_the_limits() -> None:
    """With deterministic algorithms no other is tried, so the largest tiles must fit the smallest GPU."""
    kernels = compiled("--limits")
    assert {found["kernel"] for found in kernels} >= PRODUCTS
    assert [found for found in kernels if found["shared_bytes"] > MIN_SHARED_MEMORY] == []
