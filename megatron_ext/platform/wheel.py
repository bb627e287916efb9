"""The megatron-core wheel's one fault: it ships the compiled index helpers but not the Makefile that it runs.

`megatron.training` calls `make` unconditionally and exits when it fails, on every platform.
"""

import importlib

from megatron_ext.platform.replacements import replace


def install() -> None:
    """Skip the compilation of helpers that are already compiled."""
    import megatron.core.datasets.utils as datasets

    importlib.import_module("megatron.core.datasets.helpers_cpp")  # fail here, loudly, if the helpers are absent

    replace(datasets, "compile_helpers", lambda: None, "the wheel ships helpers_cpp.so and no Makefile (everywhere)")
