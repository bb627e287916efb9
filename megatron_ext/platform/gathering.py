"""Weights that are read without calling their module, while a distributed optimizer may still be gathering them.

Under `--overlap-param-gather` Megatron's data parallelism gathers the updated weights bucket by bucket while the
forward pass runs, and waits for those of a module in a hook before the module is called. Who reads a weight past that
call must wait as well; and a bucket that nobody has waited for stops the next step.
"""

from torch import nn


def gathered[M: nn.Module](module: M) -> M:
    """The module, its weights complete: what would run before it is called has run."""
    for hook in tuple(module._forward_pre_hooks.values()):
        hook(module, ())
    return module
