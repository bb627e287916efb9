"""The map of the house is true: what docs/architecture.md names is where it says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
TABLE = [line.split("|")[1:3] for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line][1:]
ROOMS = ("pruning", "distillation", "conversion", "evaluation", "inference", "pretraining", "demo")


@pytest.mark.parametrize(("what", "where"), TABLE, ids=[what.strip() for what, _ in TABLE])
def test_each_thing_lies_where_the_page_says(what: str, where: str) -> None:
    named = re.findall(r"`([^`]+)`", where)
    assert named
    for name in named:
        for path in [name.replace("ROOM", room) for room in ROOMS] if "ROOM" in name else [name]:
            assert (ROOT / "megatron_ext" / path).exists(), path


def test_every_room_is_on_the_tree_and_says_what_is_in_it() -> None:
    for room in (ROOT / "megatron_ext").iterdir():
        if not (room / "__init__.py").is_file():
            continue
        assert re.search(rf"\b{room.name}/", PAGE), room.name
        assert (room / "__init__.py").read_text().startswith('"""'), room.name


PACKAGES = sorted((ROOT / "megatron_ext").rglob("__init__.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_a_package_says_what_each_of_its_modules_is(package: Path) -> None:
    said = ast.get_docstring(ast.parse(package.read_text()))
    assert said is not None
    own = [path for path in package.parent.iterdir() if path != package and not path.name.startswith("__pycache__")]
    for path in own:
        if path.suffix == ".py" or (path / "__init__.py").is_file():
            assert re.search(rf"(?<![a-z_]){path.stem}(?![a-z_])", said), path.stem
