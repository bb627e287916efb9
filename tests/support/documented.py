"""The commands in the pages for people, as a shell would read them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from workspace import ROOT

FOLDERS = (".", "docs", "docs/*", "docker", "examples", "examples/*")
PAGES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md") if path.is_file())
FENCED = re.compile(r"^```bash\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
LAUNCHER = ["torchrun", "--nproc-per-node"]


@dataclass(frozen=True)
class Command:
    """A command line for one of our programs.

    Attributes:
        program: `megatron-ext`, or a script of the repository's top level.
        words: What follows it.
        ranks: How many of it are started.
        environment: What is set for it alone.
    """

    program: str
    words: tuple[str, ...]
    ranks: int = 1
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def flags(self) -> list[str]:
        """The names of its flags."""
        return [word for word in self.words if word.startswith("--")]

    def value(self, flag: str) -> str:
        """What follows a flag."""
        return self.words[self.words.index(flag) + 1]


def blocks(page: Path) -> list[str]:
    """The blocks that are marked as bash."""
    return FENCED.findall(page.read_text())


def commands(page: Path) -> list[Command]:
    """Those of our programs; not what is handed to docker or srun."""
    lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    found = [_of_ours(shlex.split(line, comments=True)) for line in lines]
    return [command for command in found if command is not None]


def outside(page: Path) -> list[str]:
    """Lines that are indented as code and stand in no fenced block."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"(?<=\n\n) {4}\S.*", prose)


def _of_ours(words: list[str]) -> Command | None:
    """The command of these words, if it is one."""
    environment: list[tuple[str, str]] = []
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment.append((name, value))
    ranks = 1
    if words[:2] == LAUNCHER:
        ranks, words = int(words[2]), words[3 + (words[3] == "--no-python") :]
    elif words[:1] == ["python"]:
        words = words[1:]
    program = Path(words[0]).name if words else ""
    if program != "megatron-ext" and not (program.endswith(".py") and program == words[0]):
        return None
    return Command(program, tuple(words[1:]), ranks, tuple(environment))
