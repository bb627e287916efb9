"""The pages for people: their links lead somewhere, their commands are commands."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_ext import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path for folder in (".", "docs", "docker", "examples/*") for path in ROOT.glob(f"{folder}/*.md") if path.is_file()
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_are_bash_and_name_what_exists(page, capsys):
    for block in blocks(page):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for word in words:
                if re.fullmatch(r"[a-z_]+\.py|(examples|docker)/\S+", word):
                    assert (ROOT / word).exists(), word
            if words[:1] == ["megatron-ext"]:
                assert words[1] in cli.COMMANDS
                with pytest.raises(SystemExit):
                    cli.main([words[1], "--help"])
                flags = capsys.readouterr().out
                if words[1] != "estimate":  # which takes Megatron's, too
                    assert all(word in flags for word in words[2:] if word.startswith("--")), line


def test_there_are_pages_with_commands():
    assert sum(len(blocks(page)) for page in PAGES) > 8
