import fork_server

PROGRAM = """
import queue
from megatron.core.dist_checkpointing.strategies import filesystem_async as writer
from megatron_ext import platform
from megatron_ext.platform import replacements
from megatron_ext.platform.megatron_patches import keep_write_results

before = writer._results_queue
keep_write_results()
keep_write_results()
assert isinstance(writer.get_write_results_queue(), queue.Queue), "it would be a process"
assert len([entry for entry in replacements.table() if entry.name == "_results_queue"]) == 1
platform.uninstall()
assert writer._results_queue is before
"""


def test_a_save_starts_no_process_and_the_name_comes_back():
    done = fork_server.run_code(PROGRAM)
    assert done.returncode == 0, done.stderr
