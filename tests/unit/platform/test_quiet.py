"""What is known to be harmless is not said; what may matter still is."""

import logging
import warnings
from pathlib import Path

from transformers import LlamaConfig, PreTrainedConfig

from megatron_ext import platform

MESSAGES = (
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process.",
    "The argument order of load has been changed. Please check the document to avoid future breakages.",
)


def test_a_class_of_ours_is_no_warning_where_only_its_tokenizer_is_read(tmp_path: Path) -> None:
    """AutoTokenizer reads config.json as `PreTrainedConfig`; a model built from another class is still told."""
    (tmp_path / "config.json").write_text('{"model_type": "megatron_hybrid"}')
    heard: list[str] = []
    logger = logging.getLogger("transformers.configuration_utils")
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    try:
        platform.silence_warnings()
        PreTrainedConfig.from_pretrained(tmp_path)
        assert heard == []
        LlamaConfig.from_pretrained(tmp_path)
        assert ["type `llama`" in message for message in heard] == [True]
    finally:
        logger.removeHandler(handler)


def test_what_one_rank_reads_alone_is_no_warning() -> None:
    with warnings.catch_warnings(record=True) as heard:
        platform.silence_warnings()
        for message in (*MESSAGES, "something else"):
            warnings.warn(message, UserWarning, stacklevel=1)
    assert [str(each.message) for each in heard] == ["something else"]
