"""Every name that code refers to exists. Linters are not asked: shapes in annotations look like names to them."""

import builtins
import subprocess
import symtable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALWAYS = {*dir(builtins), "__file__", "__name__", "__doc__", "__path__", "__spec__", "__module__", "__qualname__"}


def undefined(source: str) -> set[str]:
    """Names of a module that it reads as its own or a builtin's, and that are neither."""
    module = symtable.symtable(source, "module", "exec")
    own = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    tables, wanted = [module], set[str]()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_declared_global():
                own.add(symbol.get_name())
            # Python takes what is local to a function called `top` for global.
            local = table is not module and (symbol.is_assigned() or symbol.is_parameter() or symbol.is_imported())
            if symbol.is_referenced() and (symbol.is_global() or table is module) and not local:
                wanted.add(symbol.get_name())
    return wanted - own - ALWAYS


@pytest.mark.parametrize("folder", ["megatron_ext", "tests", "benchmarks", "examples"])
def test_every_name_is_defined(folder: str) -> None:
    files = subprocess.run(
        ["git", "-C", ROOT, "ls-files", f"{folder}/*.py"], capture_output=True, text=True, check=True
    ).stdout.split() or [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")]  # fmt: skip
    wrong = {
        file: names for file in files if (ROOT / file).is_file() and (names := undefined((ROOT / file).read_text()))
    }
    assert wrong == {}


def test_an_undefined_name_is_found() -> None:
    source = """
import os
def f(x: int) -> 'Float[Tensor, "b s"]':
    y = [z for z in x]
    return os.path, y, later, gone
later = 1
class A:
    b = 1
    c = [b]
    def d(self):
        return b
def top(e):
    h = e
    return h
"""
    assert undefined(source) == {"gone", "b"}
