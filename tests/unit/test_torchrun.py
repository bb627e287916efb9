"""Of several ranks that failed in one second, the one that was ended by a signal is told, not those that noticed."""

import signal
from types import SimpleNamespace

import pytest

from megatron_ext.torchrun import cause


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ({0: (1, 100), 1: (1, 101)}, 0),
        ({0: (1, 101), 1: (1, 100)}, 1),
        ({0: (1, 100), 1: (-signal.SIGSEGV, 100)}, 1),
        ({0: (1, 100), 1: (-signal.SIGKILL, 101), 2: (1, 99)}, 1),
        ({0: (-signal.SIGTERM, 100), 1: (-signal.SIGKILL, 102)}, 1),
        ({0: (1, 100), 1: (-signal.SIGKILL, 130)}, 0),  # by torchrun, after it has waited for it to end
        ({0: (-signal.SIGABRT, 101), 1: (1, 100)}, 1),  # as NCCL does it when another rank is gone
    ],
)
def test_the_rank_that_failed_first(failures: dict[int, tuple[int, int]], expected: int) -> None:
    told = {rank: SimpleNamespace(exitcode=code, timestamp=time) for rank, (code, time) in failures.items()}
    assert cause(told) == expected
