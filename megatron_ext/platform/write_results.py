"""Where what was written into a checkpoint is noted until its index is written: in this process, where this one writes.

Megatron notes it in a process of its own, which imports torch and Megatron again: some seconds at the first save, and
several hundred MB from then on, on each rank. Only `--async-save`, where another process writes, needs that.
"""

import queue

from megatron_ext.platform.replacements import replace

REASON = "a save in this process needs no other process to note what it wrote (everywhere, unless --async-save)"


def keep_write_results() -> None:
    """Let saves of this process, which must not be asynchronous, note their results here."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer

    if not isinstance(writer._results_queue, queue.Queue):
        replace(writer, "_results_queue", queue.Queue(), REASON)
