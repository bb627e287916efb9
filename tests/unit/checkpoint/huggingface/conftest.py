"""A model as others publish it."""

from pathlib import Path

import pytest
from hf_directories import checkpoint

from megatron_ext.checkpoint.huggingface.convert import to_hf


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A Llama in two shards with a tokenizer."""
    to_hf(checkpoint(tmp_path / "made"), tmp_path / "hf", shard_bytes=6000)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"a": 1}')
    return tmp_path / "hf"
