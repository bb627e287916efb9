"""No flag of ours comes, goes or changes its default unnoticed: `flags.txt` is the list of them."""

import argparse
from difflib import unified_diff
from pathlib import Path

import fork_server
import pytest
from flag_list import line

LIST = Path(__file__).with_name("flags.txt")
PROGRAM = Path(__file__).parents[1] / "support" / "flag_list.py"


def test_our_flags_are_those_of_the_list() -> None:
    done = fork_server.run([PROGRAM])
    assert done.returncode == 0, done.stderr
    changed = unified_diff(
        LIST.read_text().splitlines(), done.stdout.splitlines(), "flags.txt", "now", lineterm="", n=0
    )
    told = "\n".join(changed)
    assert not told, f"{told}\nIf that is meant: python tests/support/flag_list.py > tests/unit/flags.txt"


@pytest.mark.parametrize(
    ("words", "keywords", "expected"),
    [
        (["--samples"], {"type": int, "default": 8}, "--samples int = 8"),
        (["--metric"], {"choices": ["l1", "l2"], "default": "l1"}, "--metric {l1, l2} = l1"),
        (["--verify"], {"action": "store_true"}, "--verify switch = False"),
        (["--bos"], {"action": argparse.BooleanOptionalAction}, "--bos, --no-bos switch = None"),
        (["--stop"], {"action": "append", "default": []}, "--stop str each time = []"),
        (["--to"], {"required": True}, "--to str required"),
        (["--task"], {"nargs": "+"}, "--task str x + = None"),
        (["checkpoint"], {"type": Path}, "checkpoint Path required"),
    ],
)
def test_a_line_says_what_a_flag_takes(words: list[str], keywords: dict, expected: str) -> None:
    assert line(argparse.ArgumentParser().add_argument(*words, **keywords)) == expected
