"""The pages for people: their links lead somewhere, their commands are commands."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
from documented import PAGES, Command, blocks, commands, outside
from workspace import ROOT

from megatron_ext import cli

EXTENSION = str(Path(sys.executable).parent / "megatron-ext")
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
# Which take Megatron's flags, too, and so are asked by a program that has them all.
WITH_MEGATRONS = dict.fromkeys(("estimate", "evaluate", "generate"), ("pretrain_hybrid.py",))
WITH_MEGATRONS["compress"] = ("prune_gpt.py", "distill_gpt.py")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_are_bash_and_name_what_exists(page):
    for block in blocks(page):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for word in words:
                if re.fullmatch(r"[a-z_]+\.py|(examples|docker)/\S+", word):
                    assert (ROOT / word).exists(), word
            if words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
            for runner in ("examples/run.sh", "examples/job.sbatch"):
                if runner in words:
                    folder, recipe = words[words.index(runner) + 1].split("/")
                    assert (ROOT / "examples" / folder / "recipes" / f"{recipe}.flags").is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_block_is_fenced(page):
    assert outside(page) == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_have_the_flags_that_they_are_given(page):
    for command in commands(page):
        assert set(command.flags) <= flags(command), command


def flags(command: Command) -> set[str]:
    """What a command's own help names, and Megatron's where it takes these."""
    if command.program != "megatron-ext":
        return named(command.program)
    name = command.words[0]
    assert name in cli.COMMANDS
    if command.words[1:] and command.words[1] in cli.COMMANDS[name].actions:
        return named(name, command.words[1])
    return named(name).union(*map(named, WITH_MEGATRONS.get(name, ())))


@functools.cache
def named(program: str, *action: str) -> set[str]:
    script = ROOT / program
    words = [script] if script.suffix == ".py" else [EXTENSION, program, *action]
    of_a_job = script.suffix == ".py" or (cli.COMMANDS[program].flags == "job" and not action)
    done = fork_server.run([*words, "--help", *(["all"] if of_a_job and program != "torchrun" else [])])
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z0-9][\w-]*", done.stdout))


@pytest.mark.parametrize("page", ["install.md", "pretrain.md"])
def test_what_a_page_looks_at_before_the_launch_can_be_launched(page):
    (command,) = [command for command in commands(ROOT / "docs" / page) if "--dry-run" in command.words]
    done = fork_server.run([ROOT / command.program, *command.words], environment=dict(command.environment))
    assert done.returncode == 0, done.stderr
    assert "memory" in done.stdout


def test_the_estimate_of_a_page_is_made():
    (command,) = commands(ROOT / "docs" / "performance.md")
    done = fork_server.run([EXTENSION, *command.words])
    assert done.returncode == 0, done.stderr
    assert "GPU" in done.stdout


def test_there_are_pages_with_commands():
    assert sum(len(blocks(page)) for page in PAGES) > 8
    assert sum(len(commands(page)) for page in PAGES) > 30
