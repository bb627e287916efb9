"""A tiny corpus and a tiny trained model, made once per test session."""

import json
import sys
from pathlib import Path

import pytest
from workspace import MODEL, TRAIN, Workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A corpus of a few standard-library modules with a vocabulary of 512."""
    path = tmp_path_factory.mktemp("workspace")
    library = Path(json.__file__).parents[1]
    inputs = [str(library / name) for name in ("argparse.py", "ast.py", "typing.py", "json", "email", "asyncio")]
    command = str(Path(sys.executable).with_name("megatron-ext"))
    Workspace(path, []).run(command, "data", "--out", "data", "--vocab-size", "512", "--input", *inputs)
    flags = [
        "--data-path", "data/text_document", "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", "data/tokenizer", "--make-vocab-size-divisible-by", "8", "--split", "90,10,0",
        "--seq-length", "64", "--micro-batch-size", "4", "--global-batch-size", "8", "--padded-vocab-size", "512",
    ]  # fmt: skip
    return Workspace(path, flags)


@pytest.fixture(scope="session")
def teacher(workspace: Workspace) -> str:
    """A checkpoint after four steps on one process, in the workspace."""
    workspace.run(
        "pretrain_hybrid.py",
        *MODEL,
        *workspace.data,
        *TRAIN,
        "--train-iters",
        "4",
        "--load",
        "teacher",
        "--save",
        "teacher",
    )
    return "teacher"
