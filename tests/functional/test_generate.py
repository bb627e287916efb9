"""`megatron-ext generate` as people start it."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from workspace import Workspace

COMMAND = str(Path(sys.executable).parent / "megatron-ext")
PROMPTS = ["import os\n", "def", ""]


@pytest.fixture(scope="module")
def alone(workspace: Workspace, teacher: str) -> list[dict[str, object]]:
    (workspace.path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    flags = ["--prompts", "prompts.jsonl", "--max-new-tokens", "6", "--temperature", "0.8", "--output", "alone.jsonl"]
    done = workspace.run(COMMAND, "generate", teacher, *flags)
    assert "3 continuations" in done.stdout
    return [json.loads(line) for line in (workspace.path / "alone.jsonl").read_text().splitlines()]


def test_continuations_are_text_tokens_and_what_was_asked(alone: list[dict[str, object]]) -> None:
    assert [row["prompt"] for row in alone] == PROMPTS
    assert all(isinstance(row["text"], str) and len(row["tokens"]) == 6 for row in alone)  # type: ignore[arg-type]
    assert len({json.dumps(row["tokens"]) for row in alone}) == 3


def test_two_ranks_print_the_same(workspace: Workspace, teacher: str, alone: list[dict[str, object]]) -> None:
    flags = [word for prompt in PROMPTS[:2] for word in ("--prompt", prompt)]
    flags += ["--max-new-tokens", "6", "--temperature", "0.8", "--tensor-model-parallel-size", "2"]
    done = workspace.run(COMMAND, "generate", teacher, *flags, ranks=2)
    assert done.stdout.split("-" * 40 + "\n") == [f"{row['prompt']}{row['text']}\n" for row in alone[:2]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to continue"),
        (["--prompts", "empty.txt"], "there is no prompt"),
        (["--prompts", "book.txt"], "at most 2,048, 32 times the positions it was made for"),
        (["--prompt", "def", "--max-new-tokens", "1000000"], "tokens with --max-new-tokens"),
        (["--prompt", "x", "--chat"], "no chat template"),
        (["--prompt", "x", "--system", "y"], "with --chat"),
        (["--prompt", "x", "--output", "/proc/out.jsonl"], "nothing can be written"),
        (["--prompt", "x", "--top-p", "1.5"], "top-p of sampling"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "x", "--tokenizer", "nowhere"], "no such tokenizer"),
        (["--prompt", "x", "--tokenizer", "larger"], "more tokens than the model"),
        (["--prompt", "x", "--tensor-model-parallel-size", "3"], "does not fit the layout"),
        (["--prompt", "x", "--tensor-parallel", "2"], "unrecognized arguments"),
        (["--prompt", "x", "--load", "other"], "without a flag"),
        (["--prompt", "x", "--output", "alone.jsonl"], "not overwritten"),
    ],
)
def test_wrong_requests_end_at_once(
    workspace: Workspace, teacher: str, alone: list[dict[str, object]], flags: list[str], message: str
) -> None:
    (workspace.path / "empty.txt").write_text("\n")
    (workspace.path / "book.txt").write_text("one line " * 2000)
    if "larger" in flags:
        tokenizer = AutoTokenizer.from_pretrained(workspace.path / "data" / "tokenizer")
        tokenizer.add_tokens(["one more"])
        tokenizer.save_pretrained(workspace.path / "larger")
    done = workspace.run(COMMAND, "generate", teacher, *flags, ok=False)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_that_is_not_there_is_named(workspace: Workspace) -> None:
    done = workspace.run(COMMAND, "generate", "nowhere", "--prompt", "x", ok=False)
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
