"""Programs that are forked behave as programs that are started."""

import json
import subprocess
import sys
from pathlib import Path

import fork_server

PROGRAM = """
import atexit, json, os, random, sys, time
from pathlib import Path
import numpy, torch
atexit.register(lambda: print("ended"))
rank = int(os.environ.get("RANK", "0"))
print(__name__, __file__, sys.argv[1:], sys.path[0], os.getcwd(), sys.stdin.read(), torch.get_num_threads())
numbers = torch.rand(1).item(), numpy.random.rand(), random.random()
draws = Path(__file__).with_name(f"{sys.argv[1]}.{rank}.json")
draws.with_suffix(".part").write_text(json.dumps(numbers))
draws.with_suffix(".part").rename(draws)
if sys.argv[1] == "fail" and rank == 1:
    while len(list(Path(__file__).parent.glob("fail.*.json"))) < 3:
        time.sleep(0.01)
    sys.exit("rank 1 fails")
if sys.argv[1] == "fail":
    time.sleep(600)
if sys.argv[1] == "raise":
    raise RuntimeError("raised")
"""


def test_a_fork_is_a_start(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = fork_server.run([script, "raise"], cwd=tmp_path)
    real = subprocess.run(
        [sys.executable, script, "raise"], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout) == (real.returncode, real.stdout)
    assert done.returncode == 1
    assert done.stdout.endswith("ended\n")
    for ended in (done, real):
        assert ended.stderr.endswith("RuntimeError: raised\n")


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = fork_server.run([script, "fail"], ranks=3, cwd=tmp_path)
    assert done.returncode == 1
    assert "rank 1 fails" in done.stderr
    assert done.stdout.count("ended") == 1
    draws = [json.loads(path.read_text()) for path in tmp_path.glob("fail.*.json")]
    assert len({number for numbers in draws for number in numbers}) == 9, "forks share a random state"
